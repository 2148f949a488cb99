"""Convolutions, attentions and biases of ``B`` in a run: trained, checkpointed as adapters, resumed to the bit."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import LoraCallback


class Seeing(nn.Module):
    """Convolutions and an attention over rows of eight numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 3, padding="same", padding_mode="circular", dilation=2)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x[:, None])))).transpose(1, 2)
        return self.head((x + self.attn(x, x, x, need_weights=False)[0]).mean(1))


CONFIGS = {
    "lora": {"target_modules": ["conv", "grouped", "attn"]},
    "out_proj alone": {"target_modules": ["out_proj"], "lora_dropout": 0.0},
    "dora": {"target_modules": ["conv", "grouped", "head"], "use_dora": True},
    "lora_bias": {"target_modules": ["conv", "grouped", "head", "out_proj"], "lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:rank larger", "ignore:lora_dropout", "error:.*LoRA layers are in eval mode")
def test_an_attention_in_eval_mode_keeps_its_own_dropout_off(make_trainer, module_class, tmp_path):
    module = module_class(Seeing().eval())
    lora = LoraCallback({"r": 2, "lora_dropout": 0.2, "target_modules": ["conv", "attn"]})
    make_trainer(lora, max_epochs=1, default_root_dir=tmp_path).fit(module)
    assert module.net.conv.training
    assert not module.net.attn.training


@pytest.mark.filterwarnings("ignore:rank larger", "ignore:lora_dropout")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_of_them_goes_on_to_the_bit(kind, make_trainer, module_class, tmp_path):
    def run(folder, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        module = module_class(Seeing())
        base = {name: value.clone() for name, value in module.state_dict().items()}
        lora = LoraCallback({"r": 2, "lora_dropout": 0.2} | CONFIGS[kind])
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        make_trainer(lora, checkpoints, max_epochs=2, default_root_dir=folder).fit(module, ckpt_path=ckpt_path)
        return base, module.state_dict()

    base, whole = run(tmp_path / "whole")
    assert all(torch.equal(whole[name], value) for name, value in base.items())
    moved = [name for name in whole.keys() - base.keys() if "lora_B" in name or "magnitude" in name]
    assert moved
    assert all(whole[name].any() for name in moved)
    path = tmp_path / "whole" / "epoch=0.ckpt"
    assert all("lora_" in name for name in torch.load(path, weights_only=False)["state_dict"])
    _, resumed = run(tmp_path / "resumed", path)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
