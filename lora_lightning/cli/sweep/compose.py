"""The jobs of a sweep composed and checked before any of them starts, with all that is wrong told at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.conf import CONFIGS
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.runs import Job

_CALLBACK = ("lora_lightning.LoraCallback", "lora_lightning.callback.LoraCallback")

# All that our launchers read; other keys of a group with this name are those of somebody's jobs.
_OF_THE_SWEEP = tuple(
    f"sweep.{key}{end}"
    for key in (
        "dry_run",
        "fail_fast",
        "devices_per_job",
        "jobs_per_device",
        "reports",
        "mode",
        "jobs_at_once",
        "halving",
    )
    for end in "=."
)


@dataclass(frozen=True)
class Composed:
    """A job, and what Hydra made of its overrides.

    Attributes:
        job: The job.
        overrides: What the sweeper gave: those of the job, and ``hydra.*`` and ``sweep.*`` where there are any.
        config: The whole configuration, with that of Hydra.
    """

    job: Job
    overrides: tuple[str, ...]
    config: DictConfig

    @property
    def settings(self) -> DictConfig:
        """The configuration that the job's function gets."""
        config = self.config.copy()
        with read_write(config), open_dict(config):
            del config["hydra"]
        return config

    def on(self, accelerator: str, devices: int) -> Composed:
        """The same job on these devices."""
        return replace(self, job=replace(self.job, accelerator=accelerator, devices=devices))


Problem = tuple[int, str]
"""The number of a job and what is wrong with it."""


def compose_jobs(
    context: HydraContext, sweep: DictConfig, batch: Sequence[Sequence[str]], first: int
) -> tuple[list[Composed], list[Problem]]:
    """Compose the jobs of a batch.

    Args:
        context: Hydra's, with its config loader.
        sweep: The configuration of the sweep.
        batch: The overrides of each job.
        first: The number of the first job.

    Returns:
        The jobs, and what is wrong with those that cannot be composed, lack a value, hold a LoRA configuration that is
        refused, or share a folder.
    """
    setup_globals()
    composed: list[Composed] = []
    problems: list[Problem] = []
    for number, overrides in enumerate(batch, first):
        try:
            composed.append(_compose(context, sweep, tuple(overrides), number))
        except (HydraException, OmegaConfBaseException) as error:
            problems.append((number, str(error)))
        except LoraConfigError as error:
            lines = str(error).split("\n  - ")  # each by itself, since other jobs share some of them
            problems += [(number, line) for line in (lines[1:] or lines)]
    return composed, problems + _shared_folders(composed)


def refuse(problems: Sequence[Problem], batch: Sequence[Sequence[str]], first: int) -> None:
    """Tell what is wrong with jobs, and once what is wrong with several.

    Args:
        problems: What is wrong.
        batch: The overrides of each job.
        first: The number of the first job.

    Raises:
        LoraConfigError: Something is.
    """
    if not problems:
        return
    having: dict[str, list[int]] = {}
    for number, message in sorted(problems):
        having.setdefault(message.strip(), []).append(number)
    told = []
    for message, numbers in having.items():
        overrides = " ".join(batch[numbers[0] - first])
        who = f"job {numbers[0]} ({overrides})"
        if len(numbers) > 1:
            who = f"jobs {', '.join(map(str, numbers))} (the first is {overrides})"
        told.append(f"  - {who}: {message}".replace("\n", "\n    "))
    count = len({number for number, _ in problems})
    raise LoraConfigError(f"{count} of {len(batch)} jobs cannot be run; nothing was started:\n" + "\n".join(told))


@contextlib.contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """A context in which ``${hydra:…}`` is read from a job's configuration."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def own_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that make a job what it is: those of Hydra and of the sweep itself left out."""
    of_others = ("hydra.", "hydra/", *_OF_THE_SWEEP)
    return tuple(each for each in overrides if not each.lstrip("+~").startswith(of_others))


def is_ours(config: DictConfig) -> bool:
    """Whether a configuration is one of this package's own scripts, which says what its parts mean."""
    sources = config.hydra.runtime.config_sources
    return any(f"{each.schema}://{each.path}" == CONFIGS for each in sources if each.provider == "main")


def configured(loader: ConfigLoader, sweep: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
    """The configuration of a job, as Hydra makes it, with the job's number."""
    config = loader.load_sweep_config(sweep, list(overrides))
    with read_write(config), open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    return config


def job_folder(config: DictConfig) -> Path:
    """Where the job of a configuration leaves everything; absolute."""
    return Path(os.path.abspath(Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)))


def _compose(context: HydraContext, sweep: DictConfig, overrides: tuple[str, ...], number: int) -> Composed:
    config = configured(context.config_loader, sweep, overrides, number)
    with hydra_config(config):
        folder = job_folder(config)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder)
    with hydra_config(config):
        if is_ours(config):
            _check_whole(config)
        _check_lora(config)
    return Composed(Job(number, own_overrides(overrides), folder), overrides, config)


def _check_whole(config: DictConfig) -> None:
    """Read all settings, as a job of ours does before all else. What others leave open may be theirs to fill in."""
    if missing := sorted(key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra.")):
        raise LoraConfigError(
            f"{' and '.join(missing)} has no value yet: add {' '.join(f'{key}=…' for key in missing)}"
        )
    for key in config:
        if key != "hydra" and OmegaConf.is_config(node := config[key]):
            OmegaConf.to_container(node, resolve=True)


def _check_lora(config: DictConfig) -> None:
    """Try the configuration of each `LoraCallback` that is to be built."""
    for node in _nodes(OmegaConf.to_container(config, resolve=False), config):
        given = node.get("config")
        if given is not None:
            LoraConfig.from_dict(OmegaConf.to_container(given, resolve=True))  # type: ignore[arg-type]


def _nodes(plain: Any, node: Any) -> Iterator[DictConfig]:
    if not isinstance(plain, dict):
        return
    if plain.get("_target_") in _CALLBACK:
        yield node
    for key, below in plain.items():
        if isinstance(below, dict) and key != "hydra":
            yield from _nodes(below, node[key])


def _shared_folders(composed: Sequence[Composed]) -> list[Problem]:
    owners: dict[Path, Job] = {}
    problems: list[Problem] = []
    for each in composed:
        owner = owners.setdefault(each.job.folder, each.job)
        if set(owner.overrides) != set(each.job.overrides):
            problems.append(
                (
                    each.job.number,
                    f"its folder {each.job.folder} is that of job {owner.number} as well: hydra.sweep.subdir has to "
                    "tell jobs apart, as ${hydra.job.num} does",
                )
            )
    return problems
