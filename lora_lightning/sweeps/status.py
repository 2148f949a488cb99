"""How far a job is, in a small file that the sweep reads while it runs."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lora_lightning.reports.whole import write_whole
from lora_lightning.sweeps.runs import PROGRESS


class StatusFile(Callback):
    """Writes ``progress.json`` into a folder, whole, and a line for each validation into the job's log.

    The file has ``step`` and ``steps`` (null where nobody knows), ``loss`` and ``val_loss`` (null before there are
    any), ``seconds`` of training so far, ``seconds_left`` as the steps so far let expect, validations among them, and
    ``time`` in seconds since 1970. A file that cannot be written is warned of once and does not end the training.

    Args:
        folder: Where the file goes.
        every: Seconds between two writes at least; a validation and the end are written whenever they come.
    """

    def __init__(self, folder: str | os.PathLike[str], every: float = 1.0) -> None:
        self.path = Path(folder) / PROGRESS
        self.every = every
        self._steps: int | None = None
        self._first_step = 0
        self._started: float | None = None
        self._loss: float | None = None
        self._written = -math.inf
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell that the job has begun: what an earlier attempt has left is true no more."""
        if stage == "fit":
            self._started = None
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here: a run that is resumed has done its first steps at another time."""
        steps = trainer.estimated_stepping_batches  # may have to load data, on every rank
        self._steps = int(steps) if math.isfinite(steps) and steps > 0 else None
        self._first_step, self._started = trainer.global_step, time.monotonic()
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time: reading a loss makes a GPU wait."""
        if time.monotonic() - self._written >= self.every:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, and leave a line in the log."""
        if not trainer.is_global_zero:
            return
        status = self._write(trainer)
        at = "before training" if self._started is None else f"step {status['step']}/{status['steps'] or '?'}"
        figures = [f"{key} {status[key]:.4f}" for key in ("loss", "val_loss") if status[key] is not None]
        times = [f"{status['seconds']:.0f} s"] if self._started is not None else []
        if status["seconds_left"]:
            times.append(f"about {status['seconds_left']:.0f} s left")
        print(", ".join([at, *figures, *times]), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write how it ended."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> dict[str, Any]:
        self._written = time.monotonic()
        if not trainer.is_global_zero:
            return {}
        status = self._status(trainer)
        try:
            write_whole(self.path, json.dumps(status) + "\n")
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"how far this job is cannot be told: {self.path} cannot be written ({error})")
            self._warned = True
        return status

    def _status(self, trainer: Trainer) -> dict[str, Any]:
        metrics = trainer.callback_metrics
        if "train_loss" in metrics:  # a validation behind the fit has none
            self._loss = _finite(metrics["train_loss"])
        step, seconds = trainer.global_step, 0.0
        left = None
        if self._started is not None:
            seconds, done = time.monotonic() - self._started, step - self._first_step
            if done and self._steps is not None:
                left = seconds / done * max(0, self._steps - step)
        return {
            "step": step,
            "steps": self._steps,
            "loss": self._loss,
            "val_loss": _finite(metrics.get("val_loss")),
            "seconds": seconds,
            "seconds_left": left,
            "time": time.time(),
        }


def _finite(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None
