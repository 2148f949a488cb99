"""`lora=X` for every preset that is shipped: it trains, its folder means the same to PEFT, and it merges."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf

import lora_lightning
from lora_lightning import load_adapter, merge_lora
from lora_lightning.cli.train import main
from lora_lightning.layers import is_quantised
from lora_lightning.tasks import ModelConfig
from lora_lightning.tasks.model import load_model

PRESETS = sorted(path.stem for path in (Path(lora_lightning.__file__).parent / "presets" / "lora").glob("*.yaml"))
LENGTH = ("trainer.max_steps=3", "trainer.val_check_interval=3", "data.samples=0", "trainer.num_sanity_val_steps=0")


def _base(model):
    """For inference bitsandbytes lays weights out anew on some CPUs, which it cannot do with so small ones."""
    network = load_model(model, "causal_lm").eval()
    for layer in network.modules():
        if is_quantised(layer):
            layer.support_avx512bf16_for_cpu = False
    return network


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_travels(preset, call, tmp_path):
    done = call(main, "experiment=smoke", f"lora={preset}", *LENGTH, f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stdout + done.stderr
    model = ModelConfig.of(OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml").model))
    ours, theirs = (_base(model) for _ in range(2))
    ids = torch.randint(3, ours.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = ours(ids).logits
        load_adapter(ours, tmp_path / "adapter")
        adapted = ours(ids).logits
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(ids).logits
        merge_lora(ours)
        merged = ours(ids).logits
    assert not torch.equal(adapted, plain)
    torch.testing.assert_close(read, adapted, rtol=1e-4, atol=1e-4)
    near = 1e-4 if model.quantisation is None else 0.3 * float(plain.max() - plain.min())  # rounded to 4 bits again
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=near)
