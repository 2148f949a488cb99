"""What would fail in silence, refused before anything is injected."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lora_lightning.errors import LoraConfigError


def check_trainer(trainer: Any) -> None:
    """See that a trainer can work with the callback.

    Raises:
        LoraConfigError: If it is the other package's, or a Hydra multirun would train wrong experiments.
    """
    if not isinstance(trainer, pl.Trainer):
        raise LoraConfigError(
            f"this Trainer comes from {type(trainer).__module__.partition('.')[0]}, LoraCallback from "
            "lightning.pytorch, and the two do not mix: write `from lightning.pytorch import Trainer` (and "
            "LightningModule)"
        )
    if trainer.world_size > 1 and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and _multirun():
        raise LoraConfigError(
            f"a Hydra multirun with strategy {type(trainer.strategy).__name__} on {trainer.num_devices} devices: each "
            "further process would run the whole sweep again, and processes would train different experiments together "
            "without a word. Start each run by itself (one command for each job, without -m), or with a launcher that "
            "gives every job a process of its own"
        )


def _multirun() -> bool:
    """Whether this is a job of ``hydra -m``; where Hydra has not been imported, it is not."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return False
    return getattr(module.HydraConfig.get().mode, "name", None) == "MULTIRUN"
