"""All optimizers in a Trainer: accumulated, clipped, stopped and resumed, scheduled; and on two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
from lora_lightning.optim import lora_fa, lora_plus, lora_rite, riemannian, riemannian_sgd, schedule_free

pytestmark = pytest.mark.usefixtures("warm_starts")

MAKE = {
    "lora_plus": lambda module: lora_plus(module, lr=1e-2),
    "lora_fa": lambda module: lora_fa(module, lr=1e-2),
    "lora_rite": lambda module: lora_rite(module, lr=1e-2),
    "riemannian": lambda module: riemannian(module, lr=1e-2),
    "riemannian_sgd": lambda module: riemannian_sgd(module, lr=1e-3, momentum=0.9),
    "schedule_free": lambda module: schedule_free([p for p in module.parameters() if p.requires_grad], lr=1e-2),
}
CONFIG = {"r": 3, "lora_alpha": 6, "rank_pattern": {"2": 2}, "use_dora": True, "target_modules": ["0", "2"]}
WITHOUT = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False}


class Module(pl.LightningModule):
    """Regression with two adapted layers and a head that trains in full."""

    def __init__(self, make, share=(0, 1)):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2))
        self.make, self.share = make, share
        self.seen = []

    def loss(self, batch):
        first, every = self.share
        x, y = (part[first::every] for part in batch)
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())

    def configure_optimizers(self):
        optimizer = self.make(self)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rows():
    generator = torch.Generator().manual_seed(11)
    return DataLoader(
        TensorDataset(torch.randn(48, 8, generator=generator), torch.randn(48, 2, generator=generator)), batch_size=8
    )


def fit(make, folder, ckpt=None, module=None, **options):
    module = module or Module(make)
    trainer = pl.Trainer(
        **(WITHOUT | {"default_root_dir": folder, "enable_progress_bar": False} | options),
        callbacks=[LoraCallback(LoraConfig(**CONFIG, modules_to_save=["4"]))],
    )
    trainer.fit(module, rows(), rows(), ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize("name", MAKE)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(name, tmp_path):
    more = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    _, whole = fit(MAKE[name], tmp_path / "whole", **more)
    first, _ = fit(MAKE[name], tmp_path / "first", max_epochs=1, **more)
    (ckpt,) = Path(first.checkpoint_callback.dirpath).glob("*.ckpt")
    _, resumed = fit(MAKE[name], tmp_path / "second", ckpt=ckpt, **more)
    there = lora_state_dict(resumed)
    assert {"net.0.lora_A", "net.2.lora_magnitude", "net.4.weight"} < there.keys()
    for key, value in lora_state_dict(whole).items():
        torch.testing.assert_close(there[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", MAKE)
def test_each_learns(name, tmp_path):
    torch.manual_seed(0)
    _, module = fit(MAKE[name], tmp_path, max_epochs=3, enable_checkpointing=False)
    assert module.seen[-1] < module.seen[0]


def test_a_second_fit_with_another_optimizer_trains_a_again(tmp_path):
    _, module = fit(MAKE["lora_fa"], tmp_path, enable_checkpointing=False)
    assert not module.net[0].lora_A.requires_grad
    module.make = MAKE["lora_plus"]
    before = module.net[0].lora_A.detach().clone()
    fit(None, tmp_path, module=module, enable_checkpointing=False)
    assert not torch.equal(module.net[0].lora_A, before)


SCRIPT = """
import os
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
import pytest

torch.set_num_threads(1)
from tests.optim.test_training import CONFIG, MAKE, Module, fit, rows
from lora_lightning.optim import adamw_8bit
from lora_lightning import LoraConfig, LoraConfigError, inject_lora, lora_parameters, lora_state_dict
from lora_lightning.injection.tensors import whole

rank, out = int(os.environ["RANK"]), sys.argv[1]
for name, make in MAKE.items():
    _, module = fit(
        make, f"{out}/{name}", module=Module(make, share=(rank, 2)), devices=2, strategy="ddp",
        use_distributed_sampler=False, enable_checkpointing=False,
    )
    torch.save(lora_state_dict(module), f"{out}/{name}{rank}.pt")

mesh = init_device_mesh("cpu", (2,))
spread = [distribute_tensor(torch.ones(4, 4), mesh)]
for params in (spread, [{"params": spread}]):
    with pytest.raises(LoraConfigError, match="spreads over processes"):
        adamw_8bit(params)
for name, make in MAKE.items():
    results = []
    for spread in (False, True):
        model = Module(make).double()
        inject_lora(model, LoraConfig(**CONFIG, modules_to_save=["4"]), seed=1)
        if spread:
            fully_shard(model.net, mesh=mesh)
        optimizer = make(model)
        assert isinstance(optimizer.param_groups[0]["params"][0], DTensor) is spread
        getattr(optimizer, "train", lambda: None)()
        for x, y in rows():
            optimizer.zero_grad()
            (model.net(x.double()) - y.double()).square().mean().backward()
            optimizer.step()
        getattr(optimizer, "eval", lambda: None)()
        results.append({key: whole(p.detach()) for key, p in lora_parameters(model).items()})
    for key, value in results[0].items():
        assert torch.allclose(results[1][key], value, rtol=1e-6, atol=1e-9), (name, key)
"""


def test_two_processes_end_as_one_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "PYTHONPATH": os.getcwd(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=300)[1] for process in running]
    assert all(process.returncode == 0 for process in running), ends[0][-3000:]
    for name, make in MAKE.items():
        _, alone = fit(make, tmp_path / f"alone_{name}", enable_checkpointing=False)
        one, other = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        for key, value in lora_state_dict(alone).items():
            assert torch.equal(one[key], other[key]), (name, key)
            torch.testing.assert_close(one[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
