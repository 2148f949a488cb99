"""``about.json``: what a run is and where it runs, written as it begins: the page of one that ends early has it too."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lora_lightning import __version__
from lora_lightning.callback import LoraCallback
from lora_lightning.injection import LoraReport
from lora_lightning.reports.page.folder import ABOUT
from lora_lightning.reports.recorder import write_json

_PACKAGES = ("torch", "lightning", "transformers", "safetensors")


class AboutRun(Callback):
    """Leaves ``about.json`` in the run's folder once the adapter is in place.

    Args:
        folder: The run's folder.
        overrides: The settings that were typed.
        command: What is typed to run it again; None: this script with those settings; of its other arguments any may
            be a secret, and the page is there to be shown.
    """

    def __init__(
        self, folder: str | os.PathLike[str], overrides: Sequence[str] = (), command: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.overrides = list(overrides)
        self.command = shlex.join(["python", sys.argv[0], *self.overrides]) if command is None else command
        self._written = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it ahead of the validation before training."""
        self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where there was no such validation."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._written:
            return
        self._written = True
        steps = trainer.estimated_stepping_batches  # may have to load data, on every rank
        if not trainer.is_global_zero:
            return
        report = next((each.report for each in trainer.callbacks if isinstance(each, LoraCallback)), None)  # type: ignore[attr-defined]
        try:
            write_json(
                self.folder / ABOUT,
                {
                    "started": time.time(),
                    "command": self.command,
                    "overrides": self.overrides,
                    "planned_steps": steps if 0 < steps < float("inf") else None,
                    "adapted": None if report is None else adapted(report),
                    "environment": environment(trainer, pl_module.device),
                },
            )
        except OSError as error:  # the training matters more
            rank_zero_warn(f"{self.folder / ABOUT} could not be written: {error}")


def adapted(report: LoraReport) -> dict[str, Any]:
    """The report of the layers as plain data: a mapping for all layers that are alike, and what trains in all."""
    return {
        "layers": [dict(zip(report.HEADINGS, row, strict=True)) for row in report.summary()],
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
    }


def environment(trainer: Trainer, device: torch.device) -> dict[str, str]:
    """Versions, device and commit, by the names that people know them under; what is not known is left out."""
    devices = f"{trainer.world_size} × " if trainer.world_size > 1 else ""
    known = {
        "device": f"{devices}{_device_name(device)}",
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lora_lightning": __version__,
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "CUDA": torch.version.cuda if device.type == "cuda" else None,
        "git commit": git_commit(Path.cwd()),
    }
    return {name: value for name, value in known.items() if value}


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in a folder, and whether files differ from it; None where there is none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with changes" if changed else commit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "CPU"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
