"""Averages of adapters are those that one works out by hand from what was trained, and the base has no part in them."""

import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_parameters
from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.injection import inject_lora

pytestmark = pytest.mark.usefixtures("warm_starts")

DECAY = 0.7
ORDERS = ["lora first", "average first"]


def _data(shuffle=True):
    generator = torch.Generator().manual_seed(11)
    return DataLoader(
        TensorDataset(torch.randn(20, 8, generator=generator), torch.randn(20, 2, generator=generator)),
        batch_size=4,
        shuffle=shuffle,
    )


def _network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 2))


class Module(pl.LightningModule):
    def __init__(self, build="in init"):
        super().__init__()
        self.net = _network() if build == "in init" else None
        self.validated = []

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(_values(self))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class InConfigureModel(Module):
    def __init__(self):
        super().__init__("later")

    def configure_model(self):
        if self.net is None:
            self.net = _network()


class InSetup(Module):
    def __init__(self):
        super().__init__("later")

    def setup(self, stage):
        if self.net is None:
            self.net = _network()


class Recorder(pl.Callback):
    """Writes down what the optimizer has made, after every step and at the start of every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.epochs.append(_values(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(_values(pl_module))


def _values(module):
    return {name: p.detach().clone() for name, p in lora_parameters(module).items()}


def _base(module):
    adapters = lora_parameters(module)
    return {name: t.clone() for name, t in module.state_dict().items() if name not in adapters}


def _fit(folder, average, *, order="lora first", module=None, ckpt=None, epochs=2, **options):
    pl.seed_everything(3, verbose=False)
    module, recorder = module or Module(), Recorder()
    lora = LoraCallback(LoraConfig(r=2, lora_dropout=0.1, init_lora_weights="gaussian"))
    callbacks = [lora, average] if order == "lora first" else [average, lora]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[recorder, *callbacks, ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)],
    )
    trainer.fit(module, _data(), _data(shuffle=False), ckpt_path=ckpt)
    return trainer, module, recorder


def _ema():
    return EMAWeightAveraging(decay=DECAY)


def _swa():
    return StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1, annealing_epochs=2)


def _averages(steps):
    """Of values after every step: the first one, and from then on DECAY of the average and the rest of the value."""
    average = steps[0]
    yield average
    for values in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in values.items()}
        yield average


def _close(one, other):
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in one)


def _equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [Module, InConfigureModel, InSetup])
def test_ema_is_that_of_the_adapters(tmp_path, order, kind):
    module = kind()
    trainer, module, recorder = _fit(tmp_path, _ema(), order=order, module=module)
    averages = list(_averages(recorder.steps))
    assert len(averages) == 10
    assert any(not torch.allclose(averages[-1][name], value) for name, value in recorder.steps[-1].items())
    # Validation sees the average, training goes on with its own values, and the average is what the fit ends with.
    _close(module.validated[0], averages[4])
    _close(module.validated[1], averages[9])
    _close(_values(module), averages[9])
    whole = _network()
    for name, value in _base(module).items():
        assert torch.equal(value, whole.state_dict()[name.removeprefix("net.").replace("base.", "")]), name
    from safetensors.torch import load_file

    written = load_file(trainer.lora_path if hasattr(trainer, "lora_path") else tmp_path / "adapter" / WEIGHTS_FILE)
    assert any(torch.allclose(value, averages[9]["net.0.lora_A"]) for value in written.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("average", [_ema, _swa])
def test_a_copy_and_a_checkpoint_hold_adapters_only(tmp_path, order, average):
    callback = average()
    trainer, module, _ = _fit(tmp_path, callback, order=order)
    copied = [*callback._average_model.parameters()]
    assert sum(p.numel() for p in copied) == sum(p.numel() for p in lora_parameters(module).values())
    assert not {p.data_ptr() for p in copied} & {p.data_ptr() for p in module.parameters()}
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    statistics = {f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    states = [checkpoint["state_dict"]]
    if average is _ema:
        states.append(checkpoint["current_model_state"])
        assert set(checkpoint["averaging_state"]) == {"n_averaged"}
    for state in states:
        assert set(state) - statistics == set(lora_parameters(module))
    for state in checkpoint["callbacks"].values():
        assert set(state.get("average_model_state", {})) <= set(lora_parameters(module))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("average", "saves"),
    [
        (_ema, {"every_n_train_steps": 3}),
        (_ema, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        (_swa, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        # within an epoch Lightning does not call on_train_epoch_start again, where its SWA takes up the scheduler
    ],
)
def test_a_resumed_run_has_the_weights_and_averages_of_the_whole_one(tmp_path, order, average, saves):
    whole = average()
    _, module, recorder = _fit(tmp_path / "whole", whole, order=order, epochs=4, **saves)
    paths = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(paths) >= 4
    for path in paths:
        done = int(path.stem.split("=")[1])
        if done == len(recorder.steps):
            continue
        again = average()
        _, resumed, rest = _fit(tmp_path / path.stem, again, order=order, epochs=4, ckpt=path, **saves)
        for one, other in zip(rest.steps, recorder.steps[done:], strict=True):
            _equal(one, other)
        _equal(again._average_model.state_dict(), whole._average_model.state_dict())
        _equal(_values(resumed), _values(module))


@pytest.mark.parametrize("order", ORDERS)
def test_swa_is_the_mean_of_the_adapters_at_the_start_of_epochs(tmp_path, order):
    callback = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2)
    trainer, module, recorder = _fit(tmp_path, callback, order=order, epochs=4)
    assert len(recorder.epochs) == 4  # none is added to make statistics anew: those are the base's
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "SWALR"
    starts = recorder.epochs[1:]
    _close(_values(module), {name: torch.stack([at[name] for at in starts]).mean(0) for name in starts[0]})
    assert torch.equal(module.net[1].running_mean, _network()[1].running_mean)


def test_statistics_that_move_are_averaged(tmp_path):
    pl.seed_everything(3, verbose=False)
    lora, average = LoraCallback(LoraConfig(r=2), freeze_norm_stats=False), _ema()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({"mean": pl_module.net[1].running_mean.clone()})

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, default_root_dir=tmp_path, callbacks=[average, Watch(), lora]
    )
    trainer.fit(module, _data())
    _close({"mean": module.net[1].running_mean}, list(_averages(seen))[-1])


def test_a_model_that_the_user_injected(tmp_path):
    module = Module()
    inject_lora(module, LoraConfig(r=2, lora_dropout=0.1, init_lora_weights="gaussian"))
    _, module, recorder = _fit(tmp_path, _ema(), order="average first", module=module)
    _close(_values(module), list(_averages(recorder.steps))[-1])


def test_a_trainer_without_adapters_gets_the_callback_as_it_was(tmp_path):
    average = _ema()
    _fit(tmp_path / "lora", average)
    module = Module()
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path / "plain", callbacks=[average]
    ).fit(module, _data())
    assert average._average_model.module.net[0].weight.shape == (16, 8)


TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl, torch
from tests.strategies.test_averaging import DECAY, Module, Recorder, _averages, _close, _data, _ema, _values
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_lightning import LoraCallback, LoraConfig
out, ckpt = sys.argv[2], (sys.argv[3:] or [None])[0]
torch.set_num_threads(1)
pl.seed_everything(3 + 7 * int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
module, recorder, average = Module(), Recorder(), _ema()
trainer = pl.Trainer(
    max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=out,
    enable_progress_bar=False, callbacks=[
        recorder, average, LoraCallback(LoraConfig(r=2, lora_dropout=0.2)),
        ModelCheckpoint(out, filename="{step}", save_top_k=-1, every_n_train_steps=2),
    ],
)
trainer.fit(module, _data(), ckpt_path=ckpt)
if ckpt is None:
    _close(_values(module), list(_averages(recorder.steps))[-1])
torch.save(_values(module), f"{out}/rank{trainer.global_rank}.pt")
"""


def test_two_processes(tmp_path):
    def run(name, *arguments):
        out = tmp_path / name
        out.mkdir()
        (script := tmp_path / "script.py").write_text(TWO)
        command = [sys.executable, str(script), os.getcwd(), str(out), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    whole = run("whole")
    _equal(*whole)
    again = run("again", tmp_path / "whole" / "step=4.ckpt")
    _equal(again[0], whole[0])
    _equal(*again)
