"""Losses and gradients that are not finite: told with step and layer, and the step changes nothing."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lora_lightning import AdapterError, LoraCallback, LoraConfig

pytestmark = pytest.mark.usefixtures("warm_starts")

CONFIG = LoraConfig(r=2, lora_alpha=4)


def _values(module, optimizer):
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    return values, copy.deepcopy(optimizer.state_dict()["state"])


def _equal(one, other):
    (a, s), (b, t) = one, other
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert s.keys() == t.keys()
    assert all(torch.equal(s[n][key], t[n][key]) for n in s for key in s[n])


def test_a_loss_that_is_not_finite_with_gradients_that_are(module_class, make_trainer):
    class Diverges(module_class):
        def loss(self, batch):
            return super().loss(batch) + (float("inf") if self.trainer.global_step == 2 else 0.0)

    with pytest.raises(AdapterError, match=r"step 2 \(loss inf\): the loss is not finite, though the gradients are"):
        make_trainer(LoraCallback(CONFIG)).fit(Diverges())
    with pytest.warns(UserWarning, match=r"step 2 \(loss inf\).*the step is skipped"):
        make_trainer(LoraCallback(CONFIG, on_nonfinite="skip")).fit(Diverges())


def test_one_of_several_batches_that_are_accumulated(module_class, make_trainer):
    class Diverges(module_class):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (float("nan") if batch_idx == 2 else 0.0)

    with pytest.warns(UserWarning, match=r"step 1 \(loss nan\)") as told:
        make_trainer(LoraCallback(CONFIG, on_nonfinite="skip"), accumulate_grad_batches=2).fit(Diverges())
    assert sum("skipped" in str(each.message) for each in told) == 1


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_the_optimizers_state(module_class, make_trainer, by_hand):
    class Watched(module_class):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not by_hand
            self.seen = []

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch) * (float("nan") if batch_idx == 2 else 1.0)
            if not by_hand:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def on_train_batch_end(self, *_):
            self.seen.append(_values(self, self.trainer.optimizers[0]))

    module = Watched()
    with pytest.warns(UserWarning, match="step 2.*the step is skipped"):
        make_trainer(LoraCallback(CONFIG, on_nonfinite="skip")).fit(module)
    _equal(module.seen[1], module.seen[2])
    assert not torch.equal(module.seen[2][0]["net.0.lora_B"], module.seen[3][0]["net.0.lora_B"])


def test_what_trains_outside_the_adapted_network_counts(module_class, make_trainer):
    """Clipping by norm would spread its NaN to the adapters."""

    class Outside(module_class):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def loss(self, batch):
            bad = torch.where(self.scale > 0, 0.0, self.scale.sqrt() / 0) if self.trainer.global_step == 2 else 0
            return super().loss(batch) * self.scale + bad

    module = Outside()
    with pytest.raises(AdapterError, match=r"step 2.*first scale"):
        make_trainer(LoraCallback(CONFIG, module="net"), gradient_clip_val=1.0).fit(module)
    assert all(p.isfinite().all() for p in module.parameters())


class TestLossScaler:
    """16-mixed: overflows are the scaler's matter, a loss that is not finite is ours."""

    @staticmethod
    def _fit(make_trainer, module, **options):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = make_trainer(LoraCallback(CONFIG, **options), plugins=[plugin], max_epochs=4)
        trainer.fit(module)
        return trainer, scaler

    def test_a_loss_that_is_not_finite(self, module_class, make_trainer):
        class Diverges(module_class):
            def loss(self, batch):
                return super().loss(batch) * (float("nan") if self.trainer.global_step == 2 else 1.0)

        with pytest.raises(AdapterError, match=r"step 2 \(loss nan\)"):
            self._fit(make_trainer, Diverges())
        module = Diverges()
        with pytest.warns(UserWarning, match=r"step 2 \(loss nan\).*skipped"):
            self._fit(make_trainer, module, on_nonfinite="skip")
        assert all(p.isfinite().all() for p in module.parameters())

    def test_one_overflow_is_not_told_and_ever_more_are(self, module_class, make_trainer, recwarn):
        class Overflows(module_class):
            times = 1

            def on_after_backward(self):
                if 2 <= self.trainer.global_step < 2 + self.times:
                    self.net[0].lora_B.grad.fill_(float("inf"))

        _, scaler = self._fit(make_trainer, Overflows())
        assert scaler.get_scale() == 2.0**3
        assert not [each for each in recwarn if "not finite" in str(each.message)]
        Overflows.times = 100
        with pytest.raises(AdapterError, match=r"gradients are not finite in 1 trained tensors, first net\.0\.lora_B"):
            self._fit(make_trainer, Overflows())


TWO = """
import sys
import lightning.pytorch as pl, torch
from torch import nn
from torch.utils.data import DataLoader
from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
import benchmarks.strategy_run as runs

kind, way, bad, out = sys.argv[1:]
torch.set_num_threads(1)

class Bad:
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.global_rank == 1:
            loss = loss + float("inf") if bad == "loss" else loss * float("nan")
        return loss

module = type("M", (Bad, runs.Sharded if kind == "fsdp2" else runs.Module), {})(16, 2, False)
strategy, devices = runs.strategy_of(kind, sharded=False)
trainer = pl.Trainer(
    max_steps=5, accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
    default_root_dir=out, enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    callbacks=[LoraCallback(LoraConfig(r=4), on_nonfinite=way)],
)
rows = torch.utils.data.TensorDataset(torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(1)))
told = ""
try:
    trainer.fit(module, DataLoader(rows, batch_size=8))
except RuntimeError as error:
    told = str(error)
from lora_lightning.strategies import state_for
state = {name: p.detach() for name, p in state_for(trainer.strategy).whole_state().items()}
torch.save({"told": told, "steps": trainer.global_step, "state": state}, f"{out}/{trainer.global_rank}.pt")
sys.stdout.flush(); sys.stderr.flush()
import os
os._exit(0)
"""


@pytest.mark.parametrize(
    ("kind", "way", "bad"),
    [("ddp", "stop", "loss"), ("fsdp2", "stop", "gradient"), ("fsdp", "skip", "loss"), ("ddp", "skip", "gradient")],
)
def test_one_process_alone_stops_or_skips_for_all(tmp_path, kind, way, bad):
    script = tmp_path / "script.py"
    script.write_text(TWO)
    done = subprocess.run(
        [sys.executable, script, kind, way, bad, tmp_path],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert both[0]["told"] == both[1]["told"]
    assert both[0]["steps"] == both[1]["steps"] == (5 if way == "skip" else 2)
    assert all(torch.equal(value, both[1]["state"][name]) for name, value in both[0]["state"].items())
    assert all(value.isfinite().all() for value in both[0]["state"].values())
    if way == "stop":
        assert "step 2 (loss " in both[0]["told"]
        assert "on rank 1" in both[0]["told"]
