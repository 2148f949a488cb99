"""What puts other layers in the place of those that have adapters: they keep them, or it is told."""

import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, inject_lora, lora_parameters

pytestmark = pytest.mark.usefixtures("warm_starts")


class Quantised(nn.Linear):
    """Stands for a layer of a quantising library."""


class Converting(Precision):
    """As ``BitsandbytesPrecision``: every linear layer becomes one of its own, unless that has been done."""

    def convert_module(self, module):
        if any(isinstance(part, Quantised) for part in module.modules()):
            return module
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    new = Quantised(child.in_features, child.out_features)
                    new.load_state_dict({"weight": child.weight, "bias": child.bias})
                    parent._modules[name] = new
        return module


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(module, folder):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", plugins=[Converting()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[LoraCallback(LoraConfig(r=2))],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=4))


def test_a_precision_plugin_converts_layers_before_they_get_adapters(tmp_path):
    module = Module()
    _fit(module, tmp_path)
    assert isinstance(module.net[0], Quantised)
    assert len(lora_parameters(module)) == 4
    assert module.net[0].lora_B.abs().sum() > 0


def test_adapters_that_it_takes_away_are_told(tmp_path):
    module = Module()
    inject_lora(module, LoraConfig(r=2))
    with pytest.raises(LoraConfigError, match=r"4 adapter tensors are gone.*Converting"):
        _fit(module, tmp_path)


SYNC = """
import sys
import lightning.pytorch as pl, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lora_lightning import LoraCallback, LoraConfig, lora_state_dict

nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # it asks for GPUs

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))

    def training_step(self, batch, batch_idx):
        assert type(self.net[1]) is type(self.net[3]) is nn.SyncBatchNorm
        assert not self.net[1].training
        if batch_idx == 0:
            assert self.net[3].training
            self.net[3].running_mean.add_(1.0)  # as a GPU would: on a CPU it does not synchronise
        x = nn.functional.batch_norm(self.net[:3](batch[0]), None, None, self.net[3].weight, self.net[3].bias, True)
        return (x - 1).square().mean()

    def on_train_epoch_start(self):
        self.net.train()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module = Module()
start = module.net[3].weight.detach().clone()
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=1, strategy="ddp", sync_batchnorm=True, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
    callbacks=[LoraCallback(LoraConfig(r=2, modules_to_save=["3"]), module="net")],
)
trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=4))
saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
assert saved["state_dict"].keys() == lora_state_dict(module).keys(), lora_state_dict(module).keys()
assert "net.3.running_mean" in saved["state_dict"] and "net.1.running_mean" not in saved["state_dict"]
assert torch.equal(saved["state_dict"]["net.3.running_mean"], torch.ones(4))
assert not torch.equal(saved["state_dict"]["net.3.weight"], start)
assert saved["optimizer_states"][0]["param_groups"][0]["params"][-1] == "net.3.bias"
assert torch.equal(module.net[1].running_mean, torch.zeros(4))
from safetensors.torch import load_file
keys = load_file(sys.argv[1] + "/adapter/adapter_model.safetensors").keys()
assert any(key.endswith("3.running_mean") for key in keys), keys
"""


def test_norms_that_are_synchronised_keep_what_they_are(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SYNC, tmp_path],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
