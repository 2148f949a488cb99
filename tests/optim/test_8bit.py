"""AdamW in 8 bits: near AdamW's steps, and resumed to the bit."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
from lora_lightning.optim import adamw_8bit

pytest.importorskip("bitsandbytes")


class Module(pl.LightningModule):
    """A layer whose factors are large enough (4,096 numbers) to have moments of a byte."""

    def __init__(self, eight=True):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(256, 300))
        self.eight = eight

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return adamw_8bit(trained, lr=1e-3) if self.eight else torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)


def fit(module, folder, ckpt=None, **more):
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randn(32, 256, generator=generator), torch.randn(32, 300, generator=generator)
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        **(settings | {"default_root_dir": folder, "enable_progress_bar": False} | more),
        callbacks=[LoraCallback(LoraConfig(r=16, lora_alpha=32))],
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8), ckpt_path=ckpt)
    return trainer


def test_it_is_resumed_to_the_bit_and_near_adamw(tmp_path):
    whole, first, resumed, full = Module(), Module(), Module(), Module(eight=False)
    optimizer = fit(whole, tmp_path / "whole").optimizers[0]
    assert optimizer.state[whole.net[0].lora_A]["state1"].dtype == torch.uint8
    begun = fit(first, tmp_path / "first", max_epochs=1)
    (ckpt,) = Path(begun.checkpoint_callback.dirpath).glob("*.ckpt")
    fit(resumed, tmp_path / "resumed", ckpt=ckpt)
    fit(full, tmp_path / "full")
    there, exact = lora_state_dict(resumed), lora_state_dict(full)
    for name, value in lora_state_dict(whole).items():
        assert torch.equal(there[name], value), name
        assert (exact[name] - value).abs().mean() < 3e-4
