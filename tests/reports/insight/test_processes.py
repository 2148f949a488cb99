"""Two processes whose adapters FSDP2 has spread see what one process sees, and only the first writes."""

import os
import runpy
import subprocess
import sys

import pytest

from lora_lightning.reports.insight import read_rows

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lora_lightning import LoraCallback, LoraConfig
from lora_lightning.reports import InsightCallback
from lora_lightning.strategies.mesh import MeshStrategy
from lora_lightning.strategies.parallelize import shard

kind, out = sys.argv[1:]
torch.set_num_threads(1)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 1))

    def configure_model(self):
        if kind == "fsdp2" and not hasattr(self, "sharded"):
            self.sharded = True
            shard(self.net, self.device_mesh, precision=self.trainer.precision)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
strategy = MeshStrategy() if kind == "fsdp2" else kind
pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=1 if kind == "auto" else 2, strategy=strategy, logger=False,
    use_distributed_sampler=False, default_root_dir=out, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False,
    callbacks=[LoraCallback(LoraConfig(r=3, target_modules=["0", "2"])), InsightCallback()],
).fit(Net(), data, data)
"""


def test_spread_adapters_are_seen_whole(tmp_path, monkeypatch, warm_python):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), "auto", str(tmp_path / "auto")])
    runpy.run_path(str(script), run_name="__main__")  # in this process, which spares the imports of another
    done = subprocess.run(
        [warm_python, script, "fsdp2", tmp_path / "fsdp2"],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"insight.csv", "insight.png"} == {path.name for path in (tmp_path / "fsdp2").iterdir()} - {"adapter"}
    alone, spread = (read_rows(tmp_path / kind / "insight.csv") for kind in ("auto", "fsdp2"))
    assert [(row.step, row.layer) for row in spread] == [(s, f"net.{i}") for s in (3, 6) for i in (0, 2, 3)]
    for one, other in zip(alone, spread, strict=True):
        for name, value in vars(one).items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert getattr(other, name) == same, (one.layer, name)
