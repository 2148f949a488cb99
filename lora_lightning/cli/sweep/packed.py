"""What ``hydra/launcher=lora_packed`` does otherwise than ``lora_local``: jobs of one base are one process."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lora_lightning.cli.group_file import GroupFile, Packed
from lora_lightning.cli.sweep import launch as local
from lora_lightning.cli.sweep.again import to_go_on
from lora_lightning.cli.sweep.command import job_command, place_of, program
from lora_lightning.cli.sweep.compose import Composed, hydra_config, is_ours
from lora_lightning.sweeps import manifest, runs
from lora_lightning.sweeps.packed import grouping, halving
from lora_lightning.sweeps.packed.packable import PackableJob, base_config
from lora_lightning.sweeps.runs import Work

FOLDER = "packed"
"""In a sweep's folder: what each group's process has to do, and what it has printed."""


def launch(
    context: HydraContext,
    config: DictConfig,
    batch: Sequence[Sequence[str]],
    first: int,
    options: Mapping[str, Any],
    *,
    tells: bool = True,
) -> list[JobReturn]:
    """Run a batch of jobs and wait for them; arguments and results are those of `lora_lightning.cli.sweep.launch`."""
    return local.launch(context, config, batch, first, options, works=works, tells=tells)


def works(sweep: local.Sweep, jobs: Sequence[Composed]) -> list[Work]:
    """A process for each group of jobs that are trained together, and for each job that goes alone; says which."""
    plan = halving.Plan.of(sweep.options.halving)
    if not is_ours(sweep.config):
        print("Each job goes alone: only those of this package's own training command are trained together.")
        if plan is not None:
            print("Nothing stops before its end: sweep.halving compares jobs that are trained together.")
        return local.one_process_each(sweep, jobs)
    composed = {each.job.number: each for each in jobs}
    packable = [_packable(each) for each in jobs]
    groups = grouping.group(packable, devices=max(1, sweep.pool.places(jobs[0].job)))
    for line in grouping.told(groups):
        print(line)
    alone = [group.jobs[0].number for group in groups if group.alone is not None]
    if plan is not None and alone:
        numbers = ", ".join(map(str, alone))
        print(f"sweep.halving compares jobs that are trained together: job {numbers} goes alone, and to its end.")
    return [
        local.work_of(sweep, composed[group.jobs[0].number])
        if group.alone is not None
        else _work(sweep, [composed[one.number] for one in group.jobs], _key(group.jobs[0]))
        for group in groups
    ]


def _work(sweep: local.Sweep, jobs: Sequence[Composed], among: str) -> Work:
    place = sweep.folder / FOLDER / f"group-{jobs[0].job.number}.json"
    options = sweep.options
    file = GroupFile(
        jobs=tuple(_packed(each, sweep.folder) for each in jobs),
        places=options.jobs_at_once,
        shared_by=options.jobs_per_device,
        halving=options.halving,
        metric=options.metric,
        mode=options.mode,
        among=among,
        earlier=_folders(sweep.folder),
    ).write(place)
    return Work(
        tuple(each.job for each in jobs),
        (sys.executable, "-m", "lora_lightning.cli.packed", str(file)),
        place.with_suffix(".log"),
        ((runs.SWEEP, str(sweep.folder)),),
    )


def _packed(job: Composed, sweep: Path) -> Packed:
    overrides = (*job.overrides, *place_of(job.job, sweep), *to_go_on(job.job.folder, job.config))
    command = job_command(overrides, job.job.folder)
    arguments = command[len(program(sys.argv[0])) :]
    return Packed(job.job.number, str(job.job.folder), arguments, str(job.job.log))


def _packable(job: Composed) -> PackableJob:
    with hydra_config(job.config):
        config: dict[str, Any] = OmegaConf.to_container(job.settings, resolve=True)  # type: ignore[assignment]
    return PackableJob(job.job, config, base_config(config.get("model") or {}))


def _key(one: PackableJob) -> str:
    """What jobs have in common that are compared with each other, in a few signs."""
    return hashlib.sha256(json.dumps(grouping.shared(one), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _folders(sweep: Path) -> dict[str, str]:
    """Folders of all jobs of a sweep, which may have come to rungs at another time, those that go on among them."""
    known = manifest.read(sweep)
    return {} if known is None else {str(each.number): str(sweep / each.folder) for each in known.jobs}
