"""The trainers that are shipped: each is built, and says what its keys are for."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

import lora_lightning
from lora_lightning import LoraConfigError
from lora_lightning.strategies.blocks import WrapBlocks
from lora_lightning.strategies.mesh import MeshStrategy

TRAINERS = Path(lora_lightning.__file__).parent / "conf" / "trainer"
CPU = ("trainer.accelerator=cpu", "trainer.devices=2", "paths.output_dir=.")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DDPStrategy),
        ("multi_node", DDPStrategy),
        ("fsdp2", ModelParallelStrategy),
        ("tp", ModelParallelStrategy),
        ("fsdp2_tp", ModelParallelStrategy),
    ],
)
def test_trainers_are_built(composed, name, kind):
    trainer = instantiate(composed(f"trainer={name}", *CPU).trainer, _convert_="all", logger=False)
    assert type(trainer.strategy) is not str
    assert isinstance(trainer.strategy, kind)
    assert trainer.strategy._timeout == datetime.timedelta(minutes=30)
    assert trainer.num_nodes == (2 if name == "multi_node" else 1)
    if kind is ModelParallelStrategy:
        assert trainer.strategy._tensor_parallel_size == {"fsdp2": 1, "tp": "auto", "fsdp2_tp": 2}[name]
        assert trainer.strategy._data_parallel_size == "auto"


@pytest.mark.parametrize(
    ("size", "nodes", "expected"), [(1, 2, (8, 1)), (2, 2, (4, 2)), ("auto", 2, (2, 4)), ("auto", 1, (1, 4))]
)
def test_the_mesh_follows_from_the_devices(monkeypatch, size, nodes, expected):
    """Up to where Lightning starts the process group."""
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    strategy = MeshStrategy(tensor_parallel_size=size)
    strategy.num_nodes, strategy.parallel_devices = nodes, [torch.device("cpu")] * 4
    strategy.setup_environment()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == expected


@pytest.mark.parametrize("size", [3, 0])
def test_devices_that_cannot_be_divided(size):
    strategy = MeshStrategy(tensor_parallel_size=size)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(LoraConfigError, match=rf"tensor_parallel_size={size} does not divide the 4 processes"):
        strategy.setup_environment()


def test_the_strategy_of_fsdp_is_built(composed):
    """A Trainer with it wants a GPU."""
    trainer = composed("trainer=fsdp").trainer
    strategy = instantiate(trainer.strategy, _convert_="all")
    assert type(strategy) is FSDPStrategy
    assert isinstance(strategy.kwargs["auto_wrap_policy"], WrapBlocks)
    named = composed("trainer=fsdp", "trainer.strategy.auto_wrap_policy.classes=[LlamaDecoderLayer]").trainer
    assert instantiate(named.strategy, _convert_="all").kwargs["auto_wrap_policy"].classes == ["LlamaDecoderLayer"]


@pytest.mark.parametrize("path", sorted(TRAINERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    inside = False
    for number, line in enumerate(lines):
        inside = line.startswith("defaults:") or (inside and line.startswith(" "))
        key = re.match(r"\s*(\w+):", line)
        if key and not inside and key[1] not in ("accelerator", "strategy", "seconds", "_target_", "precision"):
            assert "  # " in line or lines[number - 1].lstrip().startswith("#"), f"{path.name}: {line}"


@pytest.mark.parametrize("path", sorted(TRAINERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_line_is_too_long_to_read(path):
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 125
