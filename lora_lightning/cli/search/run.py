"""What every search needs: where it leaves its files, and a launcher that runs jobs under numbers of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from lora_lightning.cli.sweep.compose import configured, job_folder
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.manifest import LOCK, alone_in
from lora_lightning.sweeps.manifest import NAME as MANIFEST

RESULTS = "optimization_results.yaml"


class SearchRun:
    """A search as Hydra has set it up.

    Args:
        launcher: Any of Hydra's.
        loader: Hydra's, which composes the configurations of jobs.
        config: Of the sweep.

    Attributes:
        folder: Where the search and all its jobs leave everything; absolute.
        loader: As given.
    """

    def __init__(self, launcher: Launcher, loader: ConfigLoader, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.loader = loader
        self._launcher = launcher
        if hasattr(launcher, "in_parts"):
            launcher.in_parts = True
        self._config = config

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the folder, which is made, and leave the configuration of the sweep in it.

        Raises:
            LoraConfigError: Another process holds it.
        """
        with alone_in(self.folder, "search"):
            try:
                OmegaConf.save(self._config, self.folder / "multirun.yaml")
                yield
            finally:
                self._tidy()
                if getattr(self._launcher, "in_parts", False) and (self.folder / MANIFEST).is_file():
                    self._report()

    def check_direction(self, better: str) -> None:
        """See that the sweep's report will call the same jobs the best ones.

        Args:
            better: ``"min"`` or ``"max"``.

        Raises:
            LoraConfigError: It would take the worst ones for the best.
        """
        mode = OmegaConf.select(self._config, "hydra.launcher.mode") or OmegaConf.select(self._config, "sweep.mode")
        if mode is not None and mode != better:
            key = "sweep.mode" if OmegaConf.select(self._config, "sweep.mode") else "hydra.launcher.mode"
            raise LoraConfigError(
                f"hydra.sweeper.direction={better}, and the sweep's report takes mode={mode}: its best is your "
                f"worst. Add {key}={better}"
            )

    def jobs_at_once(self) -> int | None:
        """How many jobs the launcher runs at once, where it says so."""
        say = getattr(self._launcher, "jobs_at_once", None)
        return say() if callable(say) else None

    def launch(self, jobs: Mapping[int, Sequence[str]]) -> dict[int, JobReturn]:
        """Run jobs, each under its number.

        Args:
            jobs: The overrides of each.

        Returns:
            What came of each. Launchers number what they are given from a first number on, so that jobs with a gap
            between their numbers are launched one group after the other.
        """
        returns: dict[int, JobReturn] = {}
        for numbers in _in_a_row(sorted(jobs)):
            came = self._launcher.launch([list(jobs[number]) for number in numbers], initial_job_idx=numbers[0])
            returns |= dict(zip(numbers, came, strict=True))
        return returns

    def composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """The configuration of a job, as its launcher composes it."""
        return configured(self.loader, self._config, overrides, number)

    def folder_of(self, number: int, overrides: Sequence[str]) -> Path:
        """Where a job leaves everything; absolute."""
        return job_folder(self.composed(number, overrides))

    def leave_results(self, **results: Any) -> None:
        """Write what was best, as the sweepers of Hydra do."""
        OmegaConf.save(OmegaConf.create(results), self.folder / RESULTS)

    def _report(self) -> None:
        from lora_lightning.cli.sweep_report import report  # matplotlib

        with contextlib.suppress(LoraConfigError):  # what has ended the search is what is to be told
            report(self.folder)

    def _tidy(self) -> None:
        """Leave no folder of a search of which nothing has run: it was refused, or only to be listed."""
        ours = {LOCK.format("search"), "multirun.yaml"}
        if self.folder.is_dir() and {each.name for each in self.folder.iterdir()} <= ours:
            for name in ours:
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another search has begun in it
                self.folder.rmdir()


def _in_a_row(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers in groups without gaps.

    >>> _in_a_row([3, 4, 7])
    [[3, 4], [7]]
    """
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
