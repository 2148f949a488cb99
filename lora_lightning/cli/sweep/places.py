"""On what each job of a sweep is to run: what its Trainer asks for, or the sweep gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.cli.sweep.compose import Composed, Problem, hydra_config
from lora_lightning.cli.sweep.options import Options
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.devices import Pool, meant
from lora_lightning.sweeps.runs import Job


def with_devices(
    jobs: Sequence[Composed], pool: Pool, devices_per_job: int | None
) -> tuple[list[Composed], list[Problem]]:
    """The jobs with their devices.

    Args:
        jobs: The jobs; one whose settings have no ``trainer`` gets one device.
        pool: What there is.
        devices_per_job: Devices of each job; None: what its ``trainer.devices`` says.

    Returns:
        The jobs, and what is wrong with those that ask for what no job of a sweep can have.
    """
    placed: list[Composed] = []
    problems: list[Problem] = []
    for each in jobs:
        try:
            placed.append(_with_devices(each, pool, devices_per_job))
        except (LoraConfigError, OmegaConfBaseException) as error:
            problems.append((each.job.number, str(error)))
    return placed, problems


def jobs_at_once(config: DictConfig, options: Mapping[str, Any]) -> int:
    """How many jobs of a sweep run at once, if all are placed as its own configuration says."""
    checked = Options.of(options)
    pool = Pool(checked.jobs_per_device)
    placed, _ = with_devices([Composed(Job(0, (), Path()), (), config)], pool, checked.devices_per_job)
    return max(1, pool.places(placed[0].job)) if placed else 1  # what is wrong is told when jobs are launched


def refuse_machines(config: DictConfig) -> None:
    """Refuse a job on several machines: a sweep starts it on one, where it would wait for the others for ever.

    Raises:
        LoraConfigError: It is one.
    """
    nodes = OmegaConf.select(config, "trainer.num_nodes", default=1)
    if nodes not in (None, 1):
        raise LoraConfigError(
            f"trainer.num_nodes={nodes}, and a job of a sweep runs on one machine. Start such a training by itself, "
            "without -m, as docs/strategies.md says"
        )


def _with_devices(job: Composed, pool: Pool, devices_per_job: int | None) -> Composed:
    with hydra_config(job.config):
        asked = OmegaConf.select(job.config, "trainer.devices", default=1)
        accelerator = OmegaConf.select(job.config, "trainer.accelerator", default="auto")
        refuse_machines(job.config)
    kind, number = meant(asked, accelerator, gpus=len(pool.gpus))
    if kind == "gpu" and (OmegaConf.is_list(asked) or "," in str(asked)):
        raise LoraConfigError(
            f"trainer.devices={asked} names GPUs, and which ones a job gets is for the sweep to say: give their "
            "number; CUDA_VISIBLE_DEVICES in front of the command chooses those of the whole sweep"
        )
    if devices_per_job is None:
        return job.on(kind, number)
    if asked not in ("auto", -1, "-1") and number > devices_per_job:
        raise LoraConfigError(
            f"trainer.devices={asked} is more than the sweep.devices_per_job={devices_per_job} of a job"
        )
    return job.on(kind, devices_per_job)
