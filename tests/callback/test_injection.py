"""Where the callback finds the network, what it touches, and what it tells."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf
from torch import nn

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, inject_lora, lora_parameters
from lora_lightning.injection.state import lora_layers

CONFIG = LoraConfig(r=2, lora_alpha=4)


def _built_in_setup(module_class, make_network):
    class InSetup(module_class):
        def __init__(self):
            super().__init__(net=nn.Identity())

        def setup(self, stage):
            if isinstance(self.net, nn.Identity):
                self.net = make_network()

    return InSetup()


def _built_in_configure_model(module_class, make_network):
    class InConfigureModel(module_class):
        def __init__(self):
            super().__init__(net=nn.Identity())

        def configure_model(self):
            if isinstance(self.net, nn.Identity):
                self.net = make_network()

    return InConfigureModel()


def _backbone_later(module_class, make_network):
    class Later(module_class):
        """A layer of ``__init__`` that matches, and the rest in ``configure_model``."""

        def __init__(self):
            super().__init__(net=nn.Sequential(nn.Linear(8, 8)))

        def configure_model(self):
            if len(self.net) == 1:
                self.net.append(make_network())

    return Later()


def _injected_by_hand(module_class, make_network):
    class ByHand(module_class):
        def __init__(self):
            super().__init__(net=nn.Identity())

        def configure_model(self):
            if isinstance(self.net, nn.Identity):
                self.net = make_network()
                inject_lora(self, CONFIG)

    return ByHand()


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda cls, _: cls(), 2),
        (_built_in_setup, 2),
        (_built_in_configure_model, 2),
        (_backbone_later, 3),
        (_injected_by_hand, 2),
    ],
)
def test_the_network_is_found_wherever_it_is_built(build, layers, module_class, make_network, make_trainer, tmp_path):
    module, callback = build(module_class, make_network), LoraCallback(CONFIG)
    make_trainer(callback).fit(module)
    assert len(list(lora_layers(module))) == layers
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(lora_parameters(module))
    assert any(p.abs().max() > 0 for name, p in lora_parameters(module).items() if name.endswith("lora_B"))
    assert not {"configure_model", "configure_optimizers"} & vars(module).keys()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_base_does_not_move(module, make_trainer):
    before = {name: p.clone() for name, p in module.named_parameters()}
    make_trainer(LoraCallback(CONFIG), max_epochs=2).fit(module)
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("config", [CONFIG, {"r": 2, "lora_alpha": 4}, OmegaConf.create({"r": 2, "lora_alpha": 4})])
def test_a_config_in_any_form(config, module, make_trainer):
    callback = LoraCallback(config)
    make_trainer(callback, fast_dev_run=True).fit(module)
    assert {(row.r, row.scaling) for row in callback.report.rows} == {(2, 2.0)}


def test_without_a_config_it_is_the_balanced_pattern(module, make_trainer):
    callback = LoraCallback()
    with pytest.warns(UserWarning, match="rank larger"):
        make_trainer(callback, fast_dev_run=True).fit(module)
    assert {(row.r, row.scaling) for row in callback.report.rows} == {(16, 2.0)}
    assert {layer.lora_dropout for _, layer in lora_layers(module)} == {0.05}


def test_with_a_module_nothing_outside_it_is_touched(module, make_trainer):
    module.head = nn.Linear(2, 2)
    module.loss = lambda batch: (module.head(module.net(batch[0])) - batch[1]).square().mean()
    before = module.head.weight.clone()
    make_trainer(LoraCallback(CONFIG, module="net")).fit(module)
    assert module.head.weight.requires_grad
    assert not torch.equal(module.head.weight, before)
    assert type(module.head) is nn.Linear


def test_two_callbacks_on_two_modules(two_networks, make_trainer, tmp_path):
    module = two_networks
    first = LoraCallback(CONFIG, module="net", name="one")
    second = LoraCallback(LoraConfig(r=1), module="other", name="two")
    trainer = make_trainer(first, second)
    trainer.fit(module)
    assert {layer.lora_r for _, layer in lora_layers(module.net)} == {2}
    assert {layer.lora_r for _, layer in lora_layers(module.other)} == {1}
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["one", "two"]
    trainer.validate(module, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "all-linear"}, "must be a LoraConfig"),
        ({"config": {"rank": 3}}, "called 'r'"),
        ({"on_nonfinite": "ignore"}, "'stop' or 'skip'"),
        ({"name": "a/b"}, "folder's name"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(LoraConfigError, match=message):
        LoraCallback(**arguments)


def test_a_module_that_is_not_there(module, make_trainer):
    with pytest.raises(LoraConfigError, match=r"no such attribute \(did you mean net"):
        make_trainer(LoraCallback(CONFIG, module="nett")).fit(module)


def test_two_callbacks_of_one_name_are_refused(module, make_trainer):
    with pytest.raises((LoraConfigError, RuntimeError), match=r"name|state_key"):
        make_trainer(LoraCallback(CONFIG), LoraCallback(CONFIG)).fit(module)


def test_another_config_on_the_module_is_refused_naming_both(module, make_trainer):
    inject_lora(module, LoraConfig(r=1))
    with pytest.raises(LoraConfigError, match="r: 1 here, 2 there"):
        make_trainer(LoraCallback(CONFIG)).fit(module)


def test_a_task_type_that_contradicts_the_task_is_refused(module, make_trainer):
    type(module).lora_task_type = "CAUSAL_LM"
    try:
        with pytest.raises(LoraConfigError, match="'SEQ_CLS' contradicts Module, which trains 'CAUSAL_LM'"):
            make_trainer(LoraCallback({"r": 2, "task_type": "SEQ_CLS"})).fit(module)
        callback = LoraCallback(CONFIG)
        make_trainer(callback, fast_dev_run=True).fit(module)
        assert callback.checkpoint_entry(module)["lora_config"]["task_type"] == "CAUSAL_LM"
    finally:
        del type(module).lora_task_type


def test_the_other_lightning_is_told_apart(module):
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        pass

    trainer = pytorch_lightning.Trainer(callbacks=[], logger=False, accelerator="cpu")
    with pytest.raises(LoraConfigError, match=r"from lightning\.pytorch import Trainer"):
        LoraCallback(CONFIG).setup(trainer, Other(), "fit")


def test_one_line_and_the_paste_ready_head(bert, make_trainer, caplog):
    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = bert

        def training_step(self, batch, batch_idx):
            return self.model(batch[0], labels=batch[1]).loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.randint(0, 64, (4, 6)), torch.randint(0, 5, (4,))), 2
            )

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with caplog.at_level(logging.INFO):
        make_trainer(LoraCallback({"r": 2, "target_modules": ["query"], "lora_dropout": 0.1})).fit(Classifier())
    lines = [record.getMessage() for record in caplog.records if "LoRA" in record.getMessage()]
    assert "2 layers adapted, r=2" in lines[0]
    assert "modules_to_save=['classifier']" in lines[1]
    assert "eval mode; put in train mode" in lines[2]


def test_facts_go_to_every_logger(module, make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path, name="", version="csv"), TensorBoardLogger(tmp_path, name="", version="tb")]
    make_trainer(LoraCallback(CONFIG), logger=loggers).fit(module)
    for logger in loggers:
        params = logger.hparams if isinstance(logger, TensorBoardLogger) else logger.experiment.hparams
        assert params["lora/trainable_parameters"] == 2 * (8 + 16) + 2 * (16 + 2)
        assert params["lora/r"] == 2
