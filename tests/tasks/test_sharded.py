"""A task under strategies that spread its model: the steps of the same rows on one device, or with whole models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_lightning
from lora_lightning import LoraConfigError
from lora_lightning.tasks import CausalLM, ModelConfig, SequenceClassification

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = Path(lora_lightning.__file__).parents[1] / "scripts" / "train.py"


def _train(folder: Path, *settings: str) -> dict:
    command = [sys.executable, SCRIPT, "experiment=smoke", "lora.lora_dropout=0", "trainer.max_steps=5"]
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu", f"hydra.run.dir={folder}", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_fsdp2_is_ddp_and_tensor_parallel_is_one_device(tmp_path):
    small = ["data.batch_size=4", "model.in_parts=true"]
    for spread, settings in {
        "fsdp2": ["trainer=ddp", "trainer.devices=2", "data.batch_size=4"],
        "tp": ["trainer=cpu", "data.batch_size=4"],  # both processes see all rows
    }.items():
        expected = _train(tmp_path / f"for_{spread}", *settings)
        given = _train(tmp_path / spread, f"trainer={spread}", "trainer.devices=2", *small)
        assert given.keys() == expected.keys()
        assert max(value.abs().max() for name, value in expected.items() if "lora_B" in name) > 1e-4
        for name, value in expected.items():
            assert (given[name] - value).abs().max() < 1e-4, (spread, name)


def test_weights_read_later_are_the_same(tmp_path):
    whole, later = (CausalLM({"name": "demo:tiny-llama", "in_parts": value}) for value in (False, True))
    assert all(p.is_meta for p in later.model.parameters())
    assert later.model.training
    later.configure_model()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(later.model.state_dict()[name], value), name
    assert later.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert later.generate_text(["the minister"]) == whole.generate_text(["the minister"])
    before = later.model.lm_head.weight
    later.configure_model()
    assert later.model.lm_head.weight is before


def test_a_classifier_starts_its_head_from_the_seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        task = SequenceClassification({"name": "demo:tiny-llama", "in_parts": True}, num_labels=3)
        task.configure_model()
        heads.append(task.model.score.weight)
    assert torch.equal(*heads)
    assert heads[0].std() > 0


def test_in_parts_is_true_or_false():
    with pytest.raises(LoraConfigError, match="in_parts must be true or false, got 'yes'"):
        ModelConfig("demo:tiny-llama", in_parts="yes")
