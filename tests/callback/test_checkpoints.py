"""Checkpoints: adapters only, plain values only, canonical names; and everything that reads them."""

import enum
import functools
import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraCallback,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    load_from_checkpoint,
    lora_parameters,
    save_adapter,
)
from lora_lightning.adapters import adapter_from_checkpoint, read_record
from lora_lightning.strategies.primitives import keep_primitives

CONFIG = LoraConfig(r=2, lora_alpha=4)


def _fit(make_trainer, module, *, callback=None, **options):
    callback = callback or LoraCallback(CONFIG)
    trainer = make_trainer(callback, ModelCheckpoint(monitor="val_loss"), **options)
    trainer.fit(module)
    return trainer, callback


def _read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_adapters_and_moving_statistics_only(module, make_trainer, tmp_path, weights_only):
    trainer = make_trainer(LoraCallback(CONFIG, freeze_norm_stats=False))
    trainer.fit(module)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path, weights_only=weights_only)
    state = _read(path)["state_dict"]
    statistics = {f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(state) == set(lora_parameters(module)) | statistics
    base = [p for p in module.net.parameters() if not p.requires_grad]
    assert not any(torch.equal(p, value) for p in base for value in state.values() if value.shape == p.shape)


def test_statistics_of_a_frozen_base_move_only_if_asked_to(module_class, make_trainer):
    for frozen in (True, False):
        module = module_class()
        before = module.net[1].running_mean.clone()
        make_trainer(LoraCallback(CONFIG, freeze_norm_stats=frozen)).fit(module)
        assert torch.equal(module.net[1].running_mean, before) is frozen


def test_the_optimizer_state_is_the_adapters_too(module, make_trainer):
    trainer, _ = _fit(make_trainer, module)
    checkpoint = _read(trainer.checkpoint_callback.best_model_path)
    moments = checkpoint["optimizer_states"][0]["state"]
    assert sorted(tuple(m["exp_avg"].shape) for m in moments.values()) == sorted(
        tuple(p.shape) for p in lora_parameters(module).values()
    )


def test_names_are_canonical_under_compile_and_load_again(module_class, make_trainer):
    class Compiled(module_class):
        def setup(self, stage):
            if stage == "fit":
                self.net = torch.compile(self.net, backend="eager")

    trainer, _ = _fit(make_trainer, Compiled())
    path = trainer.checkpoint_callback.best_model_path
    assert {name for name in _read(path)["state_dict"] if "lora" in name} == {
        f"net.{i}.lora_{part}" for i in (0, 3) for part in "AB"
    }
    plain = module_class()
    make_trainer(LoraCallback(CONFIG)).validate(plain, ckpt_path=path, verbose=False)
    best = dict(_read(path)["state_dict"])
    assert all(torch.equal(p, best[name]) for name, p in lora_parameters(plain).items())


def test_every_stage_reads_best(module, make_trainer):
    trainer, _ = _fit(make_trainer, module, max_epochs=3)
    best = trainer.checkpoint_callback.best_model_score.item()
    assert trainer.validate(module, ckpt_path="best", verbose=False)[0]["val_loss"] == pytest.approx(best)
    assert trainer.test(module, ckpt_path="best", verbose=False)[0]["val_loss"] == pytest.approx(best)
    predicted = torch.cat(trainer.predict(module, ckpt_path="best"))
    target = torch.cat([batch[1] for batch in module.val_dataloader()])
    assert (predicted - target).square().mean().item() == pytest.approx(best)


def test_a_fresh_process_reads_it_too(module_class, make_trainer, make_network):
    trainer, _ = _fit(make_trainer, module_class(make_network()), max_epochs=2)
    path = trainer.checkpoint_callback.best_model_path
    loaded = load_from_checkpoint(module_class, path, net=make_network())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    best = trainer.checkpoint_callback.best_model_score.item()
    losses = [loaded.loss(batch).item() for batch in loaded.val_dataloader()]
    assert sum(losses) / len(losses) == pytest.approx(best)


def test_load_from_checkpoint_takes_hyper_parameters_and_names_what_is_missing(module_class, make_trainer):
    class Wide(module_class):
        def __init__(self, width, lr=1e-2):
            super().__init__(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 2)), lr)
            self.save_hyperparameters()

    class Stranger(Wide):
        def __init__(self, width, lr=1e-2, *, depth):
            super().__init__(width, lr)

    trainer, _ = _fit(make_trainer, Wide(12))
    path = trainer.checkpoint_callback.best_model_path
    torch.manual_seed(0)
    assert load_from_checkpoint(Wide, path).net[0].out_features == 12
    with pytest.raises(AdapterError, match="depth"):
        load_from_checkpoint(Stranger, path)


def test_the_folders_at_the_end_and_beside_the_best(module, make_trainer, tmp_path):
    trainer, callback = _fit(make_trainer, module, max_epochs=2)
    assert callback.adapter_path == tmp_path / "adapter"
    assert callback.best_adapter_path.parent == Path(trainer.checkpoint_callback.best_model_path).parent
    last = load_file(callback.adapter_path / "adapter_model.safetensors")
    assert torch.equal(last["base_model.model.net.0.lora_A.weight"], module.net[0].lora_A)
    best = load_file(callback.best_adapter_path / "adapter_model.safetensors")
    state = _read(trainer.checkpoint_callback.best_model_path)["state_dict"]
    assert torch.equal(best["base_model.model.net.3.lora_B.weight"], state["net.3.lora_B"])


def test_a_second_fit_does_not_write_over_the_first_ones_folder(module_class, make_trainer, tmp_path):
    _fit(make_trainer, module_class())
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="holds an adapter already; this one goes to"):
        _, callback = _fit(make_trainer, module_class(), max_epochs=2)
    assert callback.adapter_path == tmp_path / "adapter-2"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_the_folder_from_a_checkpoint_without_the_base_equals_the_one_from_the_model(llama, make_trainer, tmp_path):
    class Wrapped(pl.LightningModule):
        """The transformers model somewhere inside: keys in files are relative to it."""

        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"lm": llama})

        def training_step(self, batch, batch_idx):
            return self.net["lm"](batch, labels=batch).loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randint(0, 64, (8, 6)), 4)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    callback = LoraCallback(config)
    trainer = make_trainer(callback)
    trainer.fit(Wrapped())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    folder = adapter_from_checkpoint(tmp_path / "end.ckpt")
    assert folder == tmp_path / "end-adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora_lightning.json"):
        assert (folder / name).read_bytes() == (callback.adapter_path / name).read_bytes()
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    with pytest.raises(AdapterError, match=r"no adapter 'defalt' \(did you mean default"):
        adapter_from_checkpoint(tmp_path / "end.ckpt", tmp_path / "other", name="defalt")


def test_what_is_no_adapter_checkpoint_is_refused(module, make_trainer, module_class, tmp_path):
    plain = make_trainer()
    plain.fit(module)
    plain.save_checkpoint(tmp_path / "full.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "full.ckpt").read_bytes()[:-500])
    torch.save({"x": functools.partial(print)}, tmp_path / "code.ckpt")
    for name, message in (
        ("full", "not written with a LoraCallback"),
        ("cut", "damaged"),
        ("code", "weights_only"),
    ):
        with pytest.raises(AdapterError, match=message):
            adapter_from_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / "out")
    with pytest.raises(AdapterError, match="no checkpoint at"):
        load_from_checkpoint(module_class, tmp_path / "none.ckpt")
    with pytest.raises(AdapterError, match="not written with a LoraCallback"):
        make_trainer(LoraCallback(CONFIG)).fit(module_class(), ckpt_path=tmp_path / "full.ckpt")


def test_a_checkpoint_of_another_config_is_refused_naming_both(module_class, make_trainer):
    trainer, _ = _fit(make_trainer, module_class())
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(AdapterError, match="r: 1 here, 2 there"):
        make_trainer(LoraCallback(LoraConfig(r=1, lora_alpha=4))).validate(module_class(), ckpt_path=path)


class Colour(enum.Enum):
    RED = "red"


def test_hyper_parameters_become_plain_values():
    checkpoint = {
        "hyper_parameters": {
            "net": nn.Linear(1, 1),
            "optimizer": functools.partial(torch.optim.AdamW, lr=1),
            "path": Path("a") / "b",
            "colour": Colour.RED,
            "nested": OmegaConf.create({"a": [1, "${.[0]}"], "b": None}),
            "mixed": [1, nn.ReLU(), "x"],
            "lr": 1e-3,
        },
        "hparams_type": OmegaConf,
    }
    assert keep_primitives(checkpoint) == ["net", "optimizer", "mixed[1]"]
    assert checkpoint == {
        "hyper_parameters": {
            "path": "a/b",
            "colour": "red",
            "nested": {"a": [1, 1], "b": None},
            "mixed": [1, "x"],
            "lr": 1e-3,
        }
    }


def test_a_project_in_the_shape_of_lightning_hydra_template(make_trainer, caplog):
    """Its ``save_hyperparameters`` takes in the network, and its ``setup`` compiles it; two lines are added."""

    class LitModule(pl.LightningModule):
        def __init__(self, net, optimizer, scheduler, compile):
            super().__init__()
            self.save_hyperparameters(logger=False)
            self.net = net
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.criterion(self(x), y)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val/loss", self.criterion(self(x), y))

        def setup(self, stage):
            if self.hparams.compile and stage == "fit":
                self.net = torch.compile(self.net, backend="eager")

        def configure_optimizers(self):
            optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
            scheduler = self.hparams.scheduler(optimizer=optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))

    def module():
        return LitModule(
            net(),
            functools.partial(torch.optim.Adam, lr=1e-2),
            functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau),
            compile=True,
        )

    x = torch.randn(64, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), 16)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(LoraCallback({"r": 2}), ModelCheckpoint(monitor="val/loss"), max_epochs=3)
        trainer.fit(module(), loader, loader)
    assert "being no plain values: net, optimizer, scheduler" in caplog.text
    path = Path(trainer.checkpoint_callback.best_model_path)
    checkpoint = _read(path)
    assert checkpoint["hyper_parameters"] == {"compile": True}
    assert all("lora" in name for name in checkpoint["state_dict"])
    adapter = sum(p.numel() * 4 for p in lora_parameters(trainer.lightning_module).values())
    assert path.stat().st_size < 3 * adapter + 64_000
    restored = load_from_checkpoint(LitModule, path, net=net(), optimizer=None, scheduler=None)
    best = trainer.checkpoint_callback.best_model_score.item()
    losses = [restored.criterion(restored(a), b).item() for a, b in loader]
    assert sum(losses) / len(losses) == pytest.approx(best, rel=1e-5)


def test_lr_find(module, make_trainer, tmp_path):
    trainer = make_trainer(LoraCallback(CONFIG), max_epochs=3, log_every_n_steps=1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    finder = Tuner(trainer).lr_find(module, num_training=12, min_lr=1e-4, max_lr=1.0)
    assert len(finder.results["loss"]) > 5
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    trainer.fit(module)
    assert module.net[0].lora_B.abs().max() > 0


def test_averaging_callbacks_copy_the_module_in_the_middle(module, make_trainer):
    trainer, _ = _fit(make_trainer, module)
    assert trainer.callbacks
    other = type(module)()
    make_trainer(LoraCallback(CONFIG), StochasticWeightAveraging(swa_lrs=1e-2), max_epochs=4).fit(other)
    assert other.net[0].lora_B.abs().max() > 0


def _saved_adapter(make_network, folder, shake):
    network = make_network()
    inject_lora(network, CONFIG)
    shake(network)
    return network, save_adapter(network, folder)


def test_adapter_goes_on_from_a_folder(make_network, module_class, make_trainer, shake, tmp_path):
    network, folder = _saved_adapter(make_network, tmp_path / "old", shake)
    # The folder's names are those below the network, so it is continued below the network.
    callback = LoraCallback(adapter=folder, module="net")
    module = module_class()
    trainer = make_trainer(callback, limit_train_batches=0)
    trainer.validate(module, verbose=False)
    for name, value in lora_parameters(network).items():
        assert torch.equal(lora_parameters(module)[f"net.{name}"], value)
    trainer = make_trainer(callback)
    trainer.fit(module)
    assert not torch.equal(module.net[0].lora_B, network[0].lora_B)
    with pytest.raises(LoraConfigError, match="r: 1 given, 2 saved"):
        make_trainer(LoraCallback(LoraConfig(r=1), adapter=folder, module="net")).fit(module_class())


def test_base_adapter_is_folded_in_and_the_chain_recorded(make_network, module_class, make_trainer, shake, tmp_path):
    network, folder = _saved_adapter(make_network, tmp_path / "old", shake)
    x = torch.randn(4, 8)
    module = module_class()
    callback = LoraCallback({"r": 1}, base_adapter=folder, module="net")
    trainer = make_trainer(callback, ModelCheckpoint(monitor="val_loss"))
    trainer.fit(module)
    assert read_record(callback.adapter_path)["bases"] == [str(folder)]
    from lora_lightning import lora_disabled

    with lora_disabled(module.net):
        torch.testing.assert_close(module.net.eval()[0](x), network[0](x))
    path = trainer.checkpoint_callback.best_model_path
    again = module_class()
    make_trainer(LoraCallback({"r": 1}, base_adapter=folder, module="net")).validate(
        again, ckpt_path=path, verbose=False
    )
    torch.testing.assert_close(again.net.eval()(x), module.net.eval()(x))
    fresh = make_network()
    with pytest.warns(UserWarning, match="folded in"):
        load_adapter(fresh, callback.adapter_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_precisions_and_accumulation(llama, make_trainer, precision, accumulate, tmp_path):
    class Language(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama
            llama.gradient_checkpointing_enable({"use_reentrant": False})
            llama.train()

        def training_step(self, batch, batch_idx):
            return self.model(batch, labels=batch).loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randint(0, 64, (8, 6)), 2)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Language()
    trainer = make_trainer(
        LoraCallback({"r": 2, "lora_dropout": 0.1}), precision=precision, accumulate_grad_batches=accumulate
    )
    trainer.fit(module)
    assert trainer.global_step == 4 // accumulate
    moved = [p for name, p in lora_parameters(module).items() if name.endswith("lora_B")]
    assert all(p.abs().max() > 0 for p in moved)
    assert {p.dtype for p in moved} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
