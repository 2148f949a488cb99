"""``torch.compile`` of a network's repeated blocks: one graph for all that are alike, and a word on what it costs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.strategies.blocks import blocks
from lora_lightning.tasks.dtype import likely_device


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Have each repeated block of a network compiled at its first call, in place; the whole network if it has none.

    Blocks of one class share their graphs, so that warming up takes as long for thirty of them as for two, where a
    graph of the whole network takes longer with each. Their names stay, and an adapter may be put in afterwards.

    Args:
        model: The network.
        backend: As in ``torch.compile``.

    Returns:
        How many modules it is.

    Raises:
        LoraConfigError: There is no compiler on this machine.
    """
    if backend == "inductor" and (missing := missing_compiler(likely_device())) is not None:
        raise LoraConfigError(f"compile: true needs {missing}, which is not here. Install it, or set compile: false")
    parts = blocks(model) or [model]
    for part in parts:
        # In place: torch.compile(part) would put _orig_mod. into every name. Batches differ in length: dynamic.
        part.compile(dynamic=True, backend=backend)
    return len(parts)


def missing_compiler(device: torch.device) -> str | None:
    """What ``torch.compile`` lacks on this machine to make code for a device, or None where nothing is missing."""
    if sys.platform == "win32":
        return None  # torch looks for its compiler in places of its own
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    named, usual = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    wanted = (os.environ[named].split()[0],) if os.environ.get(named) else usual
    if any(shutil.which(name) for name in wanted):
        return None
    return f"a {'C' if named == 'CC' else 'C++'} compiler ({', '.join(wanted)}; another may be named in {named})"


class WarmUp(pl.Callback):
    """Tells what compiling has cost: how long the first batch of training took, against the second.

    Args:
        count: How many modules are compiled, for what is told.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self._began = 0.0
        self._seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Begin to count."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After the second batch, tell."""
        if len(self._seconds) == 2:
            return
        self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) == 2:
            first, second = self._seconds
            rank_zero_info(
                f"torch.compile of {self.count} module{'s' * (self.count > 1)}: the first batch took {first:.1f} s, "
                f"the second {second:.1f} s, so warming up cost about {max(first - second, 0):.0f} s. "
                "Validation, and batches of a kind not met yet, may compile once more."
            )
