"""How fast a job trains, found out by a trial run of a few steps."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Pace(Callback):
    """Times the steps and the validation batches of a run, and writes what they take once training ends.

    The file has ``step`` (seconds of an optimizer step; the first one, which is slower, is left out where there are
    others), ``val_batch`` (seconds of a validation batch; null without one), ``batches`` of an epoch (null for a
    stream) and ``val_batches`` of a whole validation, and ``measured``: the seconds that all steps and validation
    batches took.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._steps: list[float] = []
        self._val_batches: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first step."""
        self._since = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a step, once its last batch is through."""
        if trainer.global_step > len(self._steps):
            now = _now(pl_module)
            self._steps.append(now - self._since)
            self._since = now

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Begin a validation batch."""
        self._began = _now(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End it; a step that goes on behind it has not taken that long."""
        seconds = _now(pl_module) - self._began
        self._val_batches.append(seconds)
        self._since += seconds

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured."""
        if not trainer.is_global_zero:
            return
        batches = trainer.num_training_batches
        found = {
            "step": statistics.median(self._steps[1:] or self._steps),
            "val_batch": statistics.median(self._val_batches) if self._val_batches else None,
            "batches": batches if math.isfinite(batches) else None,
            "val_batches": _val_batches(trainer),
            "measured": sum(self._steps) + sum(self._val_batches),
        }
        self.path.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _now(pl_module: LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return time.perf_counter()


def _val_batches(trainer: Trainer) -> int:
    """The batches of a validation, whatever the limit of this run is."""
    loaders = trainer.val_dataloaders
    several = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return sum(len(each) for each in several if each is not None)
