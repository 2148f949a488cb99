"""What the experiment trackers get besides metrics: the whole configuration, and the adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


def log_config(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Give the resolved configuration to all trackers; beside the CSV file it lies in ``config.yaml`` anyway."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(config)


def log_adapter(loggers: Iterable[Logger], folder: Path, facts: dict[str, Any]) -> None:
    """Hand the adapter folder to W&B as an artifact of type ``lora-adapter``.

    Args:
        loggers: All loggers of the run.
        folder: The adapter folder.
        facts: What is written beside it: losses, parameters.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            artifact = wandb.Artifact(f"adapter-{run.id}", type="lora-adapter", metadata=facts)
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)


def finish(loggers: Iterable[Logger] = (), *, failed: bool = False) -> None:
    """End a W&B run, whatever became of the training: else the next logger of this process goes on with it.

    Args:
        loggers: All loggers of the run, whose own runs are ended: a process of several jobs has several of them.
        failed: What W&B is told of it.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    for logger in loggers:
        if isinstance(logger, WandbLogger) and isinstance(logger._experiment, wandb.Run):
            logger._experiment.finish(exit_code=int(failed))
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))
