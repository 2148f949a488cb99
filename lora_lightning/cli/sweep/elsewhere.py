"""Sweeps under launchers that are not ours (Ray, submitit, joblib, Hydra's own): their ``sweep.json`` and their report.

Such a launcher says of its jobs only what each of them is. So every job enters itself into the manifest, and refuses to
run in the folder of another sweep; the process that began the sweep reports at its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lora_lightning import __version__
from lora_lightning.cli.sweep.command import program
from lora_lightning.cli.sweep.compose import own_overrides
from lora_lightning.cli.told import told
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import manifest
from lora_lightning.sweeps.runs import Job

_OURS = "hydra_plugins.lora_lightning."
_begun: list[Path] = []


class SweepNoted(Callback):
    """Notes the folder of a multirun under such a launcher, so that it is reported on whatever becomes of it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called in the process that begins the sweep."""
        if not config.hydra.launcher._target_.startswith(_OURS):
            with told():  # anything but a SystemExit is a warning to Hydra, and the sweep would go on
                refuse_settings(config)
                refuse_repeated(config.hydra.overrides.task)
            _begun.append(Path(config.hydra.sweep.dir).resolve())


def refuse_settings(config: DictConfig) -> None:
    """Refuse what the settings ask of a launcher of ours, which another would pass over: a dry run would train.

    Raises:
        LoraConfigError: With all of it.
    """
    usual: dict[str, Any] = {"dry_run": False, "halving": False, "jobs_per_device": 1}
    usual |= {"devices_per_job": None, "jobs_at_once": None}
    if not config.hydra.sweeper._target_.startswith(_OURS):  # those end at a failed job by themselves
        usual["fail_fast"] = False
    given = {key: value for key, value in (config.get("sweep") or {}).items() if key in usual}
    if asked := [f"sweep.{key}={str(value).lower()}" for key, value in given.items() if value != usual[key]]:
        raise LoraConfigError(
            f"{', '.join(asked)}: only hydra/launcher=lora_local and lora_packed know of that. Take one of these, or "
            f"leave it out: {config.hydra.launcher._target_} would pass it over"
        )


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Refuse a key with a value given twice: our own launchers run equal jobs once, and others would each of them.

    Raises:
        LoraConfigError: With all such values.
    """
    repeated: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        values = [str(each) for each in override.sweep_string_iterator()] if override.is_choice_sweep() else []
        repeated |= {override.get_key_element(): each for each in values if values.count(each) > 1}
    if repeated:
        listed = ", ".join(f"{key}={value}" for key, value in repeated.items())
        raise LoraConfigError(
            f"{listed} is there more than once, and equal jobs would be run as often: leave it out, or take "
            "hydra/launcher=lora_local, which runs them once"
        )


def enter(job: Job, sweep: Path, cfg: DictConfig, hydra: Any, started: Sequence[str]) -> None:
    """Put a job into the manifest of its sweep, and that into the sweep's folder where it is the first one.

    Args:
        job: The job.
        sweep: The sweep's folder; absolute.
        cfg: The job's configuration.
        hydra: Hydra's own.
        started: The command line of the sweep.

    Raises:
        LoraConfigError: The folder belongs to another sweep; with what is different.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    typed = get_args_parser().parse_args(list(started[1:])).overrides
    about = manifest.Manifest(
        name=sweep.name,
        command=tuple(started),
        script=program(started[0])[-1],
        config_name=hydra.job.config_name,
        overrides=own_overrides(typed),
        metric=cfg.get("optimized_metric"),
        mode=OmegaConf.select(cfg, "sweep.mode", default="min"),
        sweeper=hydra.sweeper._target_,
        launcher=hydra.launcher._target_,
        started=time.time(),
        version=__version__,
        jobs=tuple(manifest.entries([job], sweep)),
    )
    with FileLock(sweep / f".{manifest.NAME}.lock"):
        manifest.open_sweep(sweep, about)


def report_on_begun() -> None:
    """Report on what has been begun in this process, if any of it has got as far as a job."""
    while _begun:
        folder = _begun.pop()
        if (folder / manifest.NAME).is_file():
            from lora_lightning.cli.sweep_report import report  # matplotlib

            report(folder)
