"""Two real processes: equal adapters on both, and the result of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = """
import atexit
import os
import sys
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_lightning import LoraCallback, LoraConfig, lora_state_dict

# Registered first, so the last that Python does before it is taken down.
atexit.register(lambda: open(f"{out}/left{os.environ.get('LOCAL_RANK', 0)}", "w").write(str(not dist.is_initialized())))

devices, epochs, out, ckpt = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], (sys.argv[4:] or [None])[0]
torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = (part[self.global_rank :: devices] for part in batch)
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


generator = torch.Generator().manual_seed(11)
data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
pl.seed_everything(3 + int(__import__("os").environ.get("LOCAL_RANK", 0)), verbose=False)  # ranks need not agree
module = Module()
trainer = pl.Trainer(
    max_epochs=epochs, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    use_distributed_sampler=False, default_root_dir=out, logger=False, enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[
        LoraCallback(LoraConfig(r=2, lora_alpha=4)),
        ModelCheckpoint(out + "/ckpt", filename="{epoch}", save_top_k=-1),
    ],
)
trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=ckpt)
torch.save(lora_state_dict(module), f"{out}/rank{trainer.global_rank}.pt")
"""


def _run(tmp_path: Path, name: str, devices: int, epochs: int = 3, ckpt: Path | None = None) -> Path:
    script, out = tmp_path / "script.py", tmp_path / name
    script.write_text(SCRIPT)
    out.mkdir()
    arguments = [str(devices), str(epochs), str(out), *([str(ckpt)] if ckpt else [])]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def _difference(one: Path, other: Path) -> float:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_processes(tmp_path):
    whole = _run(tmp_path, "whole", devices=1)
    both = _run(tmp_path, "both", devices=2)
    assert _difference(both / "rank0.pt", both / "rank1.pt") == 0.0
    assert _difference(both / "rank0.pt", whole / "rank0.pt") < 1e-5
    assert [(both / f"left{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert (both / "adapter" / "adapter_model.safetensors").is_file()
    checkpoint = torch.load(both / "ckpt" / "epoch=0.ckpt", weights_only=True)
    assert len(checkpoint["lora_lightning"]["rng"]) == 2
    assert all("lora_" in name for name in checkpoint["state_dict"])
    resumed = _run(tmp_path, "resumed", devices=2, ckpt=both / "ckpt" / "epoch=0.ckpt")
    assert _difference(both / "rank0.pt", resumed / "rank0.pt") < 1e-6
    alone = _run(tmp_path, "alone", devices=1, ckpt=both / "ckpt" / "epoch=0.ckpt")
    assert _difference(alone / "rank0.pt", whole / "rank0.pt") < 1e-5
