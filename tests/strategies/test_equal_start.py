"""Adapters and what trains with them begin alike on all processes, or it is told, under engines that send nothing."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = """
import os, sys
import lightning.pytorch as pl, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, lora_parameters
import benchmarks.strategy_run as runs

kind, drawn, out = sys.argv[1:]
torch.set_num_threads(1)
runs.Module.config = LoraConfig(r=1 if kind == "fsdp2_tp" else 4, modules_to_save=["head"])
module = (runs.Sharded if kind == "fsdp2_tp" else runs.Module)(16, 2, kind == "fsdp2_tp")
torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", 0)))
if drawn != "none":
    nn.init.normal_(module.net.get_submodule(drawn).weight)
strategy, devices = runs.strategy_of(kind, sharded=False)
trainer = pl.Trainer(
    max_steps=2, accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
    default_root_dir=out, enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    callbacks=[LoraCallback(runs.Module.config)],
)
rows = TensorDataset(torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(1)))
told = ""
try:
    trainer.fit(module, DataLoader(rows, batch_size=8))
    trainer.validate(module, DataLoader(rows, batch_size=8), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, DataLoader(rows, batch_size=8))
    trainer.save_checkpoint(out + "/x.ckpt")  # sees that all have the same
except LoraConfigError as error:
    told = str(error)
open(f"{out}/{trainer.global_rank}.txt", "w").write(told)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("kind", "drawn", "message"),
    [
        ("fsdp", "head", ""),
        ("fsdp", "embed", "net.embed.weight and 0 more tensors of the base are not the same on all processes"),
        ("fsdp2_tp", "none", "2 tensor-parallel processes cannot each have a part of its 1: use a rank of at least 2"),
    ],
)
def test_what_processes_drew_for_themselves(tmp_path, kind, drawn, message):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, kind, drawn, tmp_path],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [path.read_text() for path in sorted(tmp_path.glob("?.txt"))]
    assert len(told) == (4 if kind == "fsdp2_tp" else 2)
    assert all(message in each if message else not each for each in told), told
    if not message:
        head = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["net.head.weight"]
        assert head.isfinite().all()
