"""The figures of a run, measured while it runs and left in one JSON file."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.reports.whole import write_whole

FIELDS = (
    "status",
    "val_loss_before",
    "val_loss",
    "perplexity",
    "trainable_parameters",
    "total_parameters",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "adapter_path",
    "overrides",
)
"""What every ``result.json`` says; a task's own metrics come with these."""


class RunRecorder(Callback):
    """Measure a run: steps, time, speed, memory, and the validation metrics before and after training.

    The metrics before training come from a ``trainer.validate`` ahead of the fit, or from a sanity check that covers
    the whole validation (``num_sanity_val_steps=-1``). Those after it are the latest ones: of the last validation in
    the fit or of a ``trainer.validate`` behind it.

    Attributes:
        fields: What was measured, complete once training ended: see `write_result`.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = dict.fromkeys(FIELDS)
        self.fields["status"] = "not started"
        self._before: dict[str, float] = {}
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure memory."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure time, and count parameters."""
        parameters = list(pl_module.parameters())
        self.fields["status"] = "running"
        self.fields["trainable_parameters"] = sum(each.numel() for each in parameters if each.requires_grad)
        self.fields["total_parameters"] = sum(each.numel() for each in parameters)
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a complete validation."""
        if trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps):
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_")}
        if self.fields["status"] == "not started":
            self._before = metrics
            self.fields |= {f"{key}_before": value for key, value in metrics.items()}
        else:
            self.fields |= metrics
            if "val_perplexity" in metrics:
                self.fields["perplexity"] = metrics["val_perplexity"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take stock."""
        self._take_stock(trainer, pl_module, "completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take stock of a run that was broken off."""
        asked = isinstance(exception, (KeyboardInterrupt, SystemExit))  # a signal's handler ends with the latter
        self._take_stock(trainer, pl_module, "interrupted" if asked else "failed")
        # A line of a table: what it was; the log has the rest.
        self.fields["error"] = None if asked else f"{type(exception).__name__}: {exception}".splitlines()[0]

    def state_dict(self) -> dict[str, Any]:
        """The metrics before training, for a run that is resumed."""
        return {"before": dict(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was measured before a run was broken off."""
        self._before = dict(state_dict["before"])
        self.fields |= {f"{key}_before": value for key, value in self._before.items()}

    def write_result(self, path: str | os.PathLike[str], **fields: Any) -> Path:
        """Write what was measured as JSON, whole or not at all.

        Args:
            path: The file, usually ``result.json`` in the run's folder.
            **fields: More to write, and better values for what was measured.

        Returns:
            The path. The file holds at least `FIELDS`; null is what is not known.
        """
        return write_json(path, self.fields | fields)

    def _take_stock(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        self.fields |= {
            "status": status,
            "steps": trainer.global_step,
            "seconds": time.perf_counter() - self._started if self._started else None,
            "tokens_per_second": getattr(pl_module, "tokens_per_second", None),
            "peak_memory_bytes": peak_memory_bytes(pl_module.device),
        }


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use so far: of the GPU if ``device`` is one, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a mapping as JSON, whole or not at all; numbers that are not finite become null."""
    return write_whole(Path(path), json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
