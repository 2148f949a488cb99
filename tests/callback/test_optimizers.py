"""Whatever ``configure_optimizers`` returns, it sees what trains and nothing else."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, lora_parameters

CONFIG = LoraConfig(r=2, lora_alpha=4)


def _groups(self):
    first, last = list(self.net[0].parameters()), list(self.net[3].parameters())
    bias = [p for p in self.net.parameters() if p.ndim == 1]
    weights = [p for p in first + last if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": bias, "lr": 0.5}, {"params": weights}], lr=1e-2)
    return [optimizer], [LambdaLR(optimizer, [lambda s: 0.5, lambda s: 0.9])]


RETURNS = {
    "one": lambda self: torch.optim.SGD(self.parameters(), lr=1e-2),
    "list": lambda self: [torch.optim.AdamW(self.parameters(), lr=1e-2)],
    "groups and scheduler": _groups,
    "dict with monitor": lambda self: {
        "optimizer": (optimizer := torch.optim.AdamW(self.parameters(), lr=1e-2)),
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"},
    },
    "fused": lambda self: torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True),
    "named": lambda self: torch.optim.AdamW(self.named_parameters(), lr=1e-2),
    "filtered already": lambda self: torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_only_what_trains_is_left(kind, module_class, make_trainer):
    class Own(module_class):
        configure_optimizers = RETURNS[kind]

    module = Own()
    trainer = make_trainer(LoraCallback(CONFIG), max_epochs=2)
    trainer.fit(module)
    optimizer = trainer.optimizers[0]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in lora_parameters(module).values()}
    assert len(held) == 4
    if kind == "groups and scheduler":
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, 4]
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.009)
    if kind == "named":
        assert optimizer.param_groups[0]["param_names"] == list(lora_parameters(module))
    assert all(p in optimizer.state or kind == "one" for p in held)


def test_several_optimizers(module_class, make_trainer):
    class Two(module_class):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return (
                {"optimizer": torch.optim.SGD(self.net[0].parameters(), lr=1e-2)},
                {"optimizer": torch.optim.SGD(self.net[3].parameters(), lr=1e-2)},
            )

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    module = Two()
    trainer = make_trainer(LoraCallback(CONFIG))
    trainer.fit(module)
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in trainer.optimizers] == [2, 2]


def test_an_adapter_in_no_optimizer_is_an_error(module_class, make_trainer):
    class Partly(module_class):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[3].parameters(), lr=1e-2)

    with pytest.raises(LoraConfigError, match=r"leaves adapter parameters out: net\.0\.lora_A"):
        make_trainer(LoraCallback(CONFIG)).fit(Partly())


def test_an_optimizer_made_before_injection_takes_the_adapters_of_its_layers(module_class, make_trainer):
    module = module_class()
    first = torch.optim.SGD(module.net[0].parameters(), lr=1e-2)
    last = torch.optim.SGD([{"params": [module.net[3].bias]}, {"params": [module.net[3].weight]}], lr=1e-2)
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [first, last]
    module.training_step = lambda batch, batch_idx: None
    make_trainer(LoraCallback(CONFIG), fast_dev_run=True).fit(module)
    assert [id(p) for p in first.param_groups[0]["params"]] == [id(module.net[0].lora_A), id(module.net[0].lora_B)]
    assert last.param_groups[0]["params"] == []
    assert [id(p) for p in last.param_groups[1]["params"]] == [id(module.net[3].lora_A), id(module.net[3].lora_B)]


def test_gradients_that_are_not_finite_stop_or_skip(module_class, make_trainer):
    from lora_lightning import AdapterError

    class Diverges(module_class):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss * float("nan") if self.trainer.global_step == 2 else loss

    stopped = Diverges()
    with pytest.raises(
        AdapterError, match=r"step 2 \(loss nan\): gradients are not finite in \d trained tensors, first net\.0\."
    ):
        make_trainer(LoraCallback(CONFIG)).fit(stopped)
    assert all(p.isfinite().all() for p in stopped.parameters())
    skipped = Diverges()
    trainer = make_trainer(LoraCallback(CONFIG, on_nonfinite="skip"))
    with pytest.warns(UserWarning, match="the step is skipped"):
        trainer.fit(skipped)
    assert all(p.isfinite().all() for p in skipped.parameters())
    assert trainer.global_step == 5
