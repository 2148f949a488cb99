"""A run that goes on within an epoch with other processes or batches: no row and no batch is lost count of."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.data.loaders import ResumableLoader
from lora_lightning.data.samplers import LengthGroupedSampler

ROWS = 24


class Numbers(Dataset):
    """Each row is its own number."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return torch.tensor(i)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.net(batch[:, None].float()).square().mean() * 1e-6

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _fit(folder, size, world, ckpt=None, *, lengths=None, accumulate=1, plain=False, epochs=2):
    """One process stands for the first of ``world``: what the others take is known from the sampler."""
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, accumulate_grad_batches=accumulate,
        callbacks=[
            LoraCallback(LoraConfig(r=1)),
            ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        ],
    )  # fmt: skip
    if plain:
        loader = DataLoader(Numbers(), batch_size=size, sampler=RandomSampler(range(ROWS)))
    else:
        sampler = LengthGroupedSampler(lengths, ROWS, batch_size=size, seed=1, world=world)
        loader = ResumableLoader(Numbers(), batch_size=size, sampler=sampler, trainer=trainer)
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module.seen


def _rows(seen, epoch=0):
    return [row for e, _, rows in seen if e == epoch for row in rows]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 1)), ((2, 1), (2, 2)), ((2, 2), (3, 1)), ((4, 1), (2, 1))])
@pytest.mark.parametrize("step", [2, 3])
def test_the_rows_that_are_left(tmp_path, before, after, step):
    _fit(tmp_path / "a", *before)
    order = LengthGroupedSampler(None, ROWS, batch_size=1, seed=1).order()
    seen = _fit(tmp_path / "b", *after, ckpt=tmp_path / "a" / f"step={step}.ckpt")
    size, world = after
    done = step * before[0] * before[1] // (size * world) * size * world
    assert _rows(seen) == order[done::world]
    assert seen[0][1] == done // (size * world)
    batches = ROWS // (size * world)
    assert [number for epoch, number, _ in seen if epoch == 1] == list(range(batches))
    assert [number for epoch, number, _ in seen if epoch == 0] == list(range(seen[0][1], batches))


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 1)), ((2, 1), (2, 2))])
def test_at_the_last_batch_of_an_epoch_the_next_one_is_whole(tmp_path, before, after):
    _fit(tmp_path / "a", *before)
    at = ROWS // (before[0] * before[1])
    seen = _fit(tmp_path / "b", *after, ckpt=tmp_path / "a" / f"step={at}.ckpt")
    assert [(epoch, number) for epoch, number, _ in seen] == [(1, n) for n in range(ROWS // (after[0] * after[1]))]


def test_accumulated_steps_stay_whole(tmp_path):
    _fit(tmp_path / "a", 3, 1)
    seen = _fit(tmp_path / "b", 2, 1, ckpt=tmp_path / "a" / "step=3.ckpt", accumulate=4)
    assert seen[0][1] == 4  # nine rows were done, and four batches of two are eight


@pytest.mark.parametrize("other", [{"plain": True}, {"lengths": [5] * ROWS}])
def test_another_order_is_told(tmp_path, other):
    _fit(tmp_path / "a", 2, 2, **{**other, "plain": False})
    with pytest.warns(UserWarning, match="some come twice and others not"):
        seen = _fit(tmp_path / "b", 2, 1, ckpt=tmp_path / "a" / "step=2.ckpt", **other)
    assert [number for epoch, number, _ in seen if epoch == 0] == list(range(4, 12))
