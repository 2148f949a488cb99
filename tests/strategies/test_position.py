"""A user's own loaders: a run resumed in the middle of an epoch is the uninterrupted one, to the bit."""

import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict

pytestmark = pytest.mark.usefixtures("warm_starts")

ROWS = 22


def _rows():
    generator = torch.Generator().manual_seed(11)
    return torch.randn(ROWS, 8, generator=generator)


class Augmented(Dataset):
    """Draws from torch's global generator with every row."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return (_rows()[i] + torch.randn(8),)


class Subclass(DataLoader):
    """Somebody's own loader class."""


def _shuffled(**options):
    return DataLoader(TensorDataset(_rows()), batch_size=4, shuffle=True, **options)


LOADERS = {
    "in order": lambda: DataLoader(TensorDataset(_rows()), batch_size=4),
    "dropping the last": lambda: _shuffled(drop_last=True),
    "two workers": lambda: _shuffled(num_workers=2),
    "augmented": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "batch sampler": lambda: DataLoader(
        TensorDataset(_rows()), batch_sampler=BatchSampler(RandomSampler(range(ROWS)), 4, drop_last=False)
    ),
    "subclass": lambda: Subclass(TensorDataset(_rows()), batch_size=4, shuffle=True),
}


class Module(pl.LightningModule):
    def __init__(self, seen):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.seen = seen

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        self.seen.append(sum(part[0].double().sum().item() for part in parts))
        return sum(self.net(part[0]).square().mean() for part in parts)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["batches"] = len(self.seen)


def _fit(folder, make, *, steps, every, ckpt=None, **options):
    pl.seed_everything(3 if ckpt is None else 4, verbose=False)  # a resumed process may have seeded otherwise
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saver, LoraCallback(LoraConfig(r=2, lora_dropout=0.2))],
        **options,
    )
    seen = []
    module = Module(seen)
    trainer.fit(module, make(), ckpt_path=ckpt)
    return seen, lora_state_dict(module)


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*workers.*")
@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in LOADERS), ("augmented", 2), ("in order", 2)])
def test_every_checkpoint_goes_on_as_if_nothing_had_been(tmp_path, name, accumulate):
    options = {"steps": 8 // accumulate, "every": 2 // accumulate, "accumulate_grad_batches": accumulate}
    seen, whole = _fit(tmp_path / "whole", LOADERS[name], **options)
    checkpoints = sorted((tmp_path / "whole").glob("step=*.ckpt"))
    for path in checkpoints[: 2 if "workers" in name else None]:
        done = torch.load(path, weights_only=True)["batches"]
        if done == len(seen):
            continue
        again, state = _fit(tmp_path / path.stem, LOADERS[name], ckpt=path, **options)
        assert again == seen[done:]
        assert all(torch.equal(state[key], whole[key]) for key in whole)


def test_a_run_resumed_twice(tmp_path):
    make = _shuffled
    seen, whole = _fit(tmp_path / "a", make, steps=9, every=2)
    _fit(tmp_path / "b", make, steps=4, every=1, ckpt=tmp_path / "a" / "step=2.ckpt")
    again, state = _fit(tmp_path / "c", make, steps=9, every=100, ckpt=tmp_path / "b" / "step=4.ckpt")
    assert again == seen[4:]
    assert all(torch.equal(state[key], whole[key]) for key in whole)


def test_loaders_with_a_state_of_their_own_are_left_alone(tmp_path):
    class Own(DataLoader):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            """Nothing to do."""

    loader = Own(TensorDataset(_rows()), batch_size=4)
    _fit(tmp_path, lambda: loader, steps=2, every=1)
    assert type(loader) is Own


TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl, torch
from tests.strategies.test_position import LOADERS, Module
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
out, ckpt = sys.argv[2], (sys.argv[3:] or [None])[0]
torch.set_num_threads(1)
pl.seed_everything(3 + 7 * int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
module = Module([])
trainer = pl.Trainer(
    max_steps=7, max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=out,
    enable_progress_bar=False, callbacks=[
        ModelCheckpoint(out, filename="{step}", save_top_k=-1, every_n_train_steps=2),
        LoraCallback(LoraConfig(r=2, lora_dropout=0.2)),
    ],
)
trainer.fit(module, LOADERS["augmented"](), ckpt_path=ckpt)
torch.save({"seen": module.seen, "state": lora_state_dict(module)}, f"{out}/rank{trainer.global_rank}.pt")
"""


def test_two_processes_with_different_random_states(tmp_path):
    def run(name, *arguments):
        out = tmp_path / name
        out.mkdir()
        script = tmp_path / "script.py"
        script.write_text(TWO)
        command = [sys.executable, str(script), os.getcwd(), str(out), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    whole = run("whole")
    assert whole[0]["seen"] != whole[1]["seen"]
    for step in (2, 4, 6):  # within the first epoch of three batches, within the second, and at its end
        again = run(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        for one, other in zip(again, whole, strict=True):
            assert one["seen"] == other["seen"][step:]
            assert all(torch.equal(one["state"][name], value) for name, value in other["state"].items())
