"""A task under strategies that spread its model: the steps of the same rows on one device, or with whole models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lora_lightning

SCRIPT = Path(lora_lightning.__file__).parents[1] / "scripts" / "train.py"


def _train(folder: Path, *settings: str) -> dict:
    command = [sys.executable, SCRIPT, "experiment=smoke", "lora.lora_dropout=0", "trainer.max_steps=5"]
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu", f"hydra.run.dir={folder}", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_fsdp2_is_ddp_and_tensor_parallel_is_one_device(tmp_path):
    for spread, settings in {
        "fsdp2": ["trainer=ddp", "trainer.devices=2", "data.batch_size=4"],
        "tp": ["trainer=cpu", "data.batch_size=4"],  # both processes see all rows
    }.items():
        expected = _train(tmp_path / f"for_{spread}", *settings)
        given = _train(tmp_path / spread, f"trainer={spread}", "trainer.devices=2", "data.batch_size=4")
        assert given.keys() == expected.keys()
        assert max(value.abs().max() for name, value in expected.items() if "lora_B" in name) > 1e-4
        for name, value in expected.items():
            assert (given[name] - value).abs().max() < 1e-4, (spread, name)
