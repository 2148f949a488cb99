"""Hydra's sweepers of this package: ``hydra/sweeper=lora_optuna`` and ``lora_stages``.

This is imported by each Hydra app on the machine, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Searching(Sweeper):
    """What both have in common: they are set up by Hydra, and tell errors of settings in words.

    Args:
        **options: The keys of ``hydra.sweeper``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        from hydra.core.plugins import Plugins

        self._loader, self._config = hydra_context.config_loader, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def _checked(self, kind: Any) -> Any:
        """The settings, all of which are known."""
        from dataclasses import fields

        from lora_lightning.errors import LoraConfigError, did_you_mean

        known = [each.name for each in fields(kind)]
        if unknown := [f"{key!r}{did_you_mean(key, known)}" for key in self._options if key not in known]:
            raise LoraConfigError(f"hydra.sweeper has no setting {', '.join(unknown)}. It has {', '.join(known)}")
        return kind(**self._options)

    def _run(self) -> Any:
        from lora_lightning.cli.search.run import SearchRun

        return SearchRun(self._launcher, self._loader, self._config)


class LoraOptuna(_Searching):
    """Searches with optuna; its study lies in the sweep's folder and is gone on with from there."""

    def sweep(self, arguments: list[str]) -> None:
        """Search what has several values."""
        from lora_lightning.cli.told import told

        with told():
            from lora_lightning.sweeps.study import need_optuna

            need_optuna()
            from lora_lightning.cli.search.options import Options
            from lora_lightning.cli.search.optuna_sweeper import search

            search(self._run(), self._checked(Options), arguments)


class LoraStages(_Searching):
    """Runs grids one after the other, each with the best values of those before."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the stages."""
        from lora_lightning.cli.told import told

        with told():
            from lora_lightning.cli.search.stages import Options, run_stages

            run_stages(self._run(), self._checked(Options), arguments)
