"""Loaders, and places of a checkpoint, at which a position is easily lost: what comes next is what would have come."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict

ROWS = 22  # six batches of four, the last one of two


def _rows():
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(11))


class Noisy(Dataset):
    """Draws from all three global generators with every row."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return (_rows()[i] + torch.randn(8) + random.random() + float(np.random.rand()),)


class OwnNoise(Noisy):
    """Draws from a generator of its own."""

    def __init__(self):
        self.chance = np.random.RandomState(2)

    def __getitem__(self, i):
        return (_rows()[i] + float(self.chance.rand()),)


class Buffered(IterableDataset):
    """A shuffle buffer: what comes next hangs on all that was drawn before, between the model's own draws."""

    def __iter__(self):
        buffer = []
        for row in _rows():
            buffer.append(row)
            if len(buffer) > 7:
                yield (buffer.pop(int(torch.randint(len(buffer), ()))) + random.random(),)
        while buffer:
            yield (buffer.pop(int(torch.randint(len(buffer), ()))),)


class SizedBuffered(Buffered):
    def __len__(self):
        return ROWS


class Lazy(Sampler):
    """Draws each row when it is asked for, from a generator of its own."""

    def __init__(self, chance):
        self.chance = chance

    def __iter__(self):
        for _ in range(ROWS):
            yield int(self.chance.random() * ROWS)

    def __len__(self):
        return ROWS


class Unsized(Sampler):
    def __iter__(self):
        yield from torch.randperm(ROWS).tolist()


def _plain(**options):
    return DataLoader(TensorDataset(_rows()), **{"batch_size": 4, "shuffle": True, **options})


LOADERS = {
    "shuffled": _plain,
    "own generator": lambda: _plain(generator=torch.Generator().manual_seed(3)),
    "own noise": lambda: DataLoader(OwnNoise(), batch_size=4, shuffle=True),
    "buffered": lambda: DataLoader(Buffered(), batch_size=4),
    "sized, buffered": lambda: DataLoader(SizedBuffered(), batch_size=4),
    "numpy's sampler": lambda: _plain(shuffle=False, sampler=Lazy(np.random.default_rng(4))),
    "python's sampler": lambda: _plain(shuffle=False, sampler=Lazy(random.Random(4))),
    "sampler without a length": lambda: DataLoader(Noisy(), batch_size=4, sampler=Unsized()),
    "weighted": lambda: _plain(shuffle=False, sampler=WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)),
    "no batches": lambda: DataLoader(TensorDataset(_rows()[:6]), batch_size=None, shuffle=True),
    "cycle": lambda: {"a": _plain(), "b": _plain(batch_size=12)},
    "cycle of streams": lambda: [DataLoader(Buffered(), batch_size=4), DataLoader(Buffered(), batch_size=12)],
    "longest": lambda: CombinedLoader({"a": _plain(), "b": _plain(batch_size=12)}, "max_size"),
    "persistent workers": lambda: _plain(num_workers=2, persistent_workers=True),
    "noisy workers": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2),
}
PLACES = {
    "in an epoch": {"every_n_train_steps": 4},
    "at the last batch": {"every_n_train_steps": 6},
    "at an epoch's end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "counted in steps": {"every_n_train_steps": 5, "max_steps": 15},
    "at an epoch's end, counted in steps": {"every_n_epochs": 1, "save_on_train_epoch_end": True, "max_steps": 15},
}
SLOW = ("persistent workers", "noisy workers")


class Module(pl.LightningModule):
    def __init__(self, asks_for_steps):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 2))
        self.asks_for_steps = asks_for_steps
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = [part for part in (batch.values() if isinstance(batch, dict) else [batch]) if part is not None]
        while isinstance(parts[0], (list, tuple)):
            parts = [row for part in parts for row in part]
        self.seen.append([round(part.double().sum().item(), 6) for part in parts])
        return sum(self.net(part).square().mean() for part in parts)

    def validation_step(self, batch, batch_idx):
        """Making the iterator for it draws a number."""

    def configure_optimizers(self):
        if self.asks_for_steps:  # makes loaders and iterators, long before a checkpoint is read
            assert self.trainer.estimated_stepping_batches
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def _fit(folder, make, ckpt=None, *, asks_for_steps=False, max_steps=-1, **saves):
    pl.seed_everything(3 if ckpt is None else 4, verbose=False)
    trainer = pl.Trainer(
        max_epochs=3 if max_steps < 0 else -1,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            LoraCallback(LoraConfig(r=2, lora_dropout=0.2)),
            ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saves),
        ],
    )
    module, loader = Module(asks_for_steps), make()
    trainer.fit(module, loader, DataLoader(TensorDataset(_rows()), batch_size=8), ckpt_path=ckpt)
    return module.seen, lora_state_dict(module)


def _check(folder, make, **options):
    seen, whole = _fit(folder / "whole", make, **options)
    paths = sorted((folder / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(paths) > 1
    for path in paths[:2]:
        done = int(path.stem.split("=")[1])
        again, state = _fit(folder / path.stem, make, path, **options)
        assert again == seen[done:], path.stem
        assert all(torch.equal(state[name], whole[name]) for name in whole), path.stem


@pytest.mark.filterwarnings("ignore:.*worker.*", "ignore:.*IterableDataset.*")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name in LOADERS if name not in SLOW])
def test_the_same_batches(tmp_path, name, place):
    _check(tmp_path, LOADERS[name], **PLACES[place])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*worker.*")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SLOW)
def test_the_same_batches_from_workers(tmp_path, name, place):
    _check(tmp_path, LOADERS[name], **PLACES[place])


@pytest.mark.parametrize("place", PLACES)
def test_loaders_that_were_made_before_the_checkpoint_was_read(tmp_path, place):
    _check(tmp_path, LOADERS["own generator"], asks_for_steps=True, **PLACES[place])


def test_a_users_own_loader_stays_as_it_is(tmp_path):
    loader = _plain()
    _fit(tmp_path / "a", lambda: loader, every_n_train_steps=2)
    assert type(loader) is DataLoader
    assert not hasattr(loader, "state_dict")
    assert len(list(loader)) == 6
    again, state = _fit(tmp_path / "b", lambda: loader, tmp_path / "a" / "step=8.ckpt", every_n_train_steps=100)
    seen, whole = _fit(tmp_path / "c", _plain, every_n_train_steps=100)
    assert again == seen[8:]
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_run_ended_in_an_epoch_by_its_steps_and_saved_afterwards(tmp_path):
    def fit(folder, max_steps, ckpt=None):
        pl.seed_everything(3, verbose=False)
        trainer = pl.Trainer(
            max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path / folder, enable_checkpointing=False,
            callbacks=[LoraCallback(LoraConfig(r=2))],
        )  # fmt: skip
        module = Module(asks_for_steps=False)
        trainer.fit(module, LOADERS["buffered"](), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return module.seen

    whole = fit("whole", 9)
    first = fit("first", 4)
    assert first + fit("rest", 9, tmp_path / "first.ckpt") == whole
