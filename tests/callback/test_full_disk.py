"""A disk that is full for the process that writes ends all processes with the same error, and leaves what was there."""

import os
import subprocess
import sys

import pytest

from lora_lightning import AdapterError, LoraCallback, LoraConfig
from lora_lightning.adapters.files import damage_of

pytestmark = pytest.mark.usefixtures("warm_starts")

FULL = """
import os, resource, sys
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from lora_lightning import AdapterError, LoraCallback, LoraConfig
import benchmarks.strategy_run as runs

kind, at, out = sys.argv[1], sys.argv[2], sys.argv[3]
torch.set_num_threads(1)

class Full(pl.Callback):
    def fill(self, trainer):
        if trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and at == "a checkpoint":
            self.fill(trainer)

    def on_train_end(self, trainer, module):
        self.fill(trainer)

strategy, devices = runs.strategy_of(kind, sharded=False)
trainer = pl.Trainer(
    max_steps=4, accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
    default_root_dir=out, enable_model_summary=False, use_distributed_sampler=False,
    callbacks=[Full(), ModelCheckpoint(out + "/ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1),
               LoraCallback(LoraConfig(r=4))],
)
rows = torch.utils.data.TensorDataset(torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(1)))
told = "nothing"
try:
    trainer.fit(runs.Module(16, 2, False), DataLoader(rows, batch_size=8))
except AdapterError as error:
    told = str(error)
except BaseException as error:
    told = type(error).__name__ + str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
open(f"{out}/{trainer.global_rank}.txt", "w").write(told)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("kind", "at"), [("ddp", "a checkpoint"), ("fsdp", "a checkpoint"), ("ddp", "the end of the fit")]
)
def test_all_processes_are_told(tmp_path, kind, at):
    script = tmp_path / "script.py"
    script.write_text(FULL)
    done = subprocess.run(
        [sys.executable, script, kind, at, tmp_path],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    place = tmp_path / "ckpt" / "step=3.ckpt" if at == "a checkpoint" else tmp_path / "adapter"
    assert f"{place} could not be written: File too large" in told[0]
    assert told[1] == told[0]
    saved = sorted((tmp_path / "ckpt").iterdir())
    steps = 2 if at == "a checkpoint" else 4
    assert [path.name for path in saved] == [f"step={n}.ckpt" for n in range(1, steps + 1)]
    assert all(damage_of(path) is None for path in saved)
    assert not list((tmp_path / "adapter").glob("*.safetensors*")) + list((tmp_path / "adapter").glob(".*"))


def test_a_folder_that_cannot_be_written_is_told_before_training(module, make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterError, match=r"file/run.* could not be written: Not a directory"):
        make_trainer(
            LoraCallback(LoraConfig(r=2)), default_root_dir=tmp_path / "file" / "run", enable_checkpointing=False
        ).fit(module)
    assert module.net[0].lora_B.abs().sum() == 0
