"""Lightning's Tuner: after it, everything is where it was, but for the batch size or the learning rate it has found."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(11)
    return TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))


class Rows(pl.LightningDataModule):
    """Batches of a size that can be set."""

    def __init__(self, rows, batch_size=2):
        super().__init__()
        self.rows = rows
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(3))

    def val_dataloader(self):
        return DataLoader(self.rows, 8)


def trained(module, rows, trainer, tune=None, **fields):
    """(module, batch size) after tuning and a fit."""
    data = Rows(rows, fields.pop("batch_size", 2))
    for name, value in fields.items():
        setattr(module, name, value)
    if tune is not None:
        tune(Tuner(trainer), module, data)
        assert trainer.global_step == 0
    trainer.fit(module, datamodule=data)
    return module, data.batch_size


def equal(one, other):
    states = lora_state_dict(one), lora_state_dict(other)
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


TUNINGS = {
    "power": lambda tuner, *run: tuner.scale_batch_size(run[0], datamodule=run[1], steps_per_trial=2, max_trials=3),
    "binsearch": lambda tuner, *run: tuner.scale_batch_size(
        run[0], datamodule=run[1], mode="binsearch", steps_per_trial=2, max_trials=3
    ),
    "validate": lambda tuner, *run: tuner.scale_batch_size(
        run[0], datamodule=run[1], method="validate", steps_per_trial=2, max_trials=3
    ),
    "lr": lambda tuner, *run: tuner.lr_find(run[0], datamodule=run[1], num_training=15),
}


@pytest.mark.parametrize("start", [True, "pissa", "eva"])
@pytest.mark.parametrize("how", TUNINGS)
def test_a_fit_after_tuning_is_the_fit_without(module_class, make_trainer, rows, tmp_path, how, start):
    if start == "eva" and how in ("power", "binsearch"):
        pytest.skip("begins as the batches of the size show that it was given first")

    def make():
        callback = LoraCallback(LoraConfig(r=2, init_lora_weights=start))
        return module_class(), rows, make_trainer(callback, max_epochs=2, default_root_dir=tmp_path)

    first = 8 if how == "lr" else 2
    ours, size = trained(*make(), TUNINGS[how], batch_size=first)
    assert (size > first) == (how != "lr")
    theirs, _ = trained(*make(), batch_size=size, lr=ours.lr)
    assert equal(ours, theirs)
    assert not list(tmp_path.rglob(".*.ckpt"))
    base = module_class().state_dict()
    if start is True:
        assert all(torch.equal(value, base[name]) for name, value in ours.state_dict().items() if name in base)


def test_too_large_a_batch_is_gone_back_from(module_class, make_trainer, rows):
    class Greedy(module_class):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 4:  # in the words that Lightning knows an exhausted memory by
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(LoraCallback(LoraConfig(r=2)), max_epochs=1)
    module, size = trained(Greedy(), rows, trainer, TUNINGS["power"])
    assert size == 4
    theirs, _ = trained(module_class(), rows, make_trainer(LoraCallback(LoraConfig(r=2)), max_epochs=1), batch_size=4)
    assert equal(module, theirs)


def test_the_batch_size_of_the_projects_own_data_is_found(make_trainer):
    from lora_lightning.data import TinyText
    from lora_lightning.tasks import CausalLM

    def make(**sizes):
        torch.manual_seed(0)
        data = TinyText(rows=40, val_rows=2, group_by_length=False, **sizes)
        return CausalLM("demo:tiny-llama"), data, make_trainer(LoraCallback(LoraConfig(r=2)), max_steps=2)

    task, data, trainer = make(batch_size=2)
    size = Tuner(trainer).scale_batch_size(task, datamodule=data, steps_per_trial=1, max_trials=2)
    assert size == data.batch_size > 2
    trainer.fit(task, datamodule=data)
    assert trainer.train_dataloader.batch_size == size
    given, its_data, its_trainer = make(batch_size=size)
    its_trainer.fit(given, datamodule=its_data)
    assert equal(task, given)
