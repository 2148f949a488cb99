"""The launchers ``hydra/launcher=lora_local`` and ``hydra/launcher=lora_packed``.

This is imported by each Hydra app on the machine: what they do is imported when they do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LoraLocal(Launcher):
    """Runs every job of a multirun as a process of its own, on the devices of this machine.

    Args:
        **options: Those of ``hydra/launcher/lora_local.yaml``, which says what they mean.
    """

    in_parts = False
    """Whether a search launches batch after batch, and prints the report of all of them itself."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has made of the command line; the task function itself runs in the jobs' processes only."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs and wait for all of them."""
        from lora_lightning.cli.sweep.launch import launch

        tells = not self.in_parts
        return launch(self.hydra_context, self.config, job_overrides, initial_job_idx, self.options, tells=tells)

    def jobs_at_once(self) -> int:
        """How many jobs run at once: as many a searching sweeper chooses together."""
        from lora_lightning.cli.sweep.places import jobs_at_once

        return jobs_at_once(self.config, self.options)


class LoraPacked(LoraLocal):
    """Trains the jobs that share a base model together in one process, the others as `LoraLocal` does.

    Args:
        **options: Those of ``hydra/launcher/lora_packed.yaml``, which says what they mean.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs and wait for all of them."""
        from lora_lightning.cli.sweep.packed import launch

        tells = not self.in_parts
        return launch(self.hydra_context, self.config, job_overrides, initial_job_idx, self.options, tells=tells)

    def jobs_at_once(self) -> int:
        """As many as were asked for; otherwise 8, since how many fit is known only once a model is there."""
        return self.options.get("jobs_at_once") or 8
