"""What ``hydra/launcher=lora_local`` does with a batch of jobs, from their overrides to what they return.

A searching sweeper launches batch after batch into the same folder; a grid is one batch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_lightning import __version__
from lora_lightning.cli.sweep import returns
from lora_lightning.cli.sweep.again import to_go_on
from lora_lightning.cli.sweep.command import (
    clean_environment,
    job_command,
    job_variables,
    place_of,
    program,
    refuse_ranks,
)
from lora_lightning.cli.sweep.compose import Composed, compose_jobs, own_overrides, refuse
from lora_lightning.cli.sweep.options import Options, refuse_of_packed
from lora_lightning.cli.sweep.places import with_devices
from lora_lightning.cli.sweep.prepare import prepare_all
from lora_lightning.cli.sweep.watch import SweepTable
from lora_lightning.cli.told import told
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import engine, manifest, runs
from lora_lightning.sweeps.devices import Pool
from lora_lightning.sweeps.manifest import Entry, Manifest
from lora_lightning.sweeps.processes import wait_for_earlier
from lora_lightning.sweeps.runs import Job, Work


@dataclass(frozen=True)
class Sweep:
    """What a launch is about.

    Attributes:
        folder: The sweep's folder; absolute.
        config: The sweep's configuration, as Hydra has composed it.
        options: Its settings.
        pool: The devices that there are.
    """

    folder: Path
    config: DictConfig
    options: Options
    pool: Pool


Works = Callable[[Sweep, Sequence[Composed]], Sequence[Work]]
"""Makes pieces of work of the jobs that are to run."""


def launch(
    context: HydraContext,
    config: DictConfig,
    batch: Sequence[Sequence[str]],
    first: int,
    options: Mapping[str, Any],
    *,
    works: Works | None = None,
    tells: bool = True,
) -> list[JobReturn]:
    """Run a batch of jobs and wait for them.

    Args:
        context: Hydra's, with its config loader.
        config: The configuration of the sweep.
        batch: The overrides of each job.
        first: The number of the first job.
        options: The settings of the sweep.
        works: Makes pieces of work of the jobs that are to run; None: one of each job.
        tells: Whether the report is printed too; whoever launches batch after batch prints it at the end.

    Returns:
        What each job came to. One that failed raises `JobFailed` when its value is asked for.

    Raises:
        SystemExit: Something about the sweep is wrong, which has been told; it was ended with Ctrl-C; or it was only
            to be listed.
    """
    with _told():
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        refuse_ranks(os.environ)
        checked = Options.of(options)
        if works is None:
            refuse_of_packed(OmegaConf.select(config, "sweep.halving"), OmegaConf.select(config, "sweep.jobs_at_once"))
        sweep = Sweep(Path(config.hydra.sweep.dir).resolve(), config, checked, Pool(checked.jobs_per_device))
        try:
            jobs = _jobs(context, sweep, batch, first)
        except LoraConfigError:
            _remove_what_hydra_wrote(sweep.folder)
            raise
        if checked.dry_run:
            _list_only(sweep, jobs)
        with manifest.alone_in(sweep.folder):
            return _run(sweep, jobs, works or one_process_each, tells)


def one_process_each(sweep: Sweep, jobs: Sequence[Composed]) -> list[Work]:
    """A process for each job, which goes on with what an earlier attempt has left."""
    return [work_of(sweep, each) for each in jobs]


def work_of(sweep: Sweep, job: Composed) -> Work:
    """The process of one job."""
    overrides = (*job.overrides, *place_of(job.job, sweep.folder), *to_go_on(job.job.folder, job.config))
    variables = job_variables(sweep.folder, job.job.number)
    return Work((job.job,), job_command(overrides, job.job.folder), job.job.log, tuple(variables.items()))


def _jobs(context: HydraContext, sweep: Sweep, batch: Sequence[Sequence[str]], first: int) -> list[Composed]:
    """All jobs, composed, checked and with their devices; or all that is wrong with them."""
    if not batch:
        swept = " ".join(sweep.config.hydra.overrides.task)
        raise LoraConfigError(f"This grid has no jobs: one of its keys is given no values ({swept})")
    jobs, problems = compose_jobs(context, sweep.config, batch, first)
    jobs, more = with_devices(jobs, sweep.pool, sweep.options.devices_per_job)
    refuse(problems + more, batch, first)
    sweep.pool.check([each.job for each in jobs])
    return jobs


def _run(sweep: Sweep, jobs: Sequence[Composed], works: Works, tells: bool) -> list[JobReturn]:
    """Run what is not finished yet, leave the report, and gather what all jobs came to."""
    print(f"Sweep folder: {sweep.folder}", flush=True)
    goes_on = (sweep.folder / manifest.NAME).exists()
    known = manifest.open_sweep(sweep.folder, _manifest(sweep, jobs))
    try:
        _wait_for_earlier([each.job for each in jobs])
        to_run = _left(jobs, known)
        pieces = works(sweep, to_run) if to_run else ()
        if len(pieces) > 1:  # a single process makes what it needs, and nobody waits for it
            prepare_all([each.config for each in to_run])
    except LoraConfigError:
        if not goes_on:  # nothing was started: the corrected command may have the folder
            (sweep.folder / manifest.NAME).unlink()
        raise
    outcomes: Mapping[int, engine.Outcome] = {}
    try:
        if pieces:
            outcomes = engine.run(
                pieces,
                sweep.pool,
                fail_fast=sweep.options.fail_fast,
                watch=SweepTable(sweep.options.metric),
                environment=clean_environment(),
            )
    except BaseException:
        with contextlib.suppress(LoraConfigError):  # what has ended the sweep is what is to be told
            _report(sweep, tells)
        raise
    _report(sweep, tells)
    return [_return(sweep, each, known, outcomes) for each in jobs]


def _wait_for_earlier(jobs: Sequence[Job]) -> None:
    """What a killed sweep has left running saves before it ends: only then is it known which job is how far."""
    if held := wait_for_earlier(jobs, print):
        raise LoraConfigError(
            "Processes that an earlier start of this sweep has left running do not end: "
            + ", ".join(f"job {job.number} in {job.folder}" for job in held)
            + ". End them, then start the sweep again"
        )


def _left(jobs: Sequence[Composed], known: Manifest) -> list[Composed]:
    """The jobs that are to run; what is said of the others."""
    left, finished = [], 0
    for each in jobs:
        twin = _twin(each, known)
        if twin is not None:
            print(f"Job {each.job.number} has the settings of job {twin.number}: it is run once for both")
        elif runs.is_finished(each.job):
            finished += 1
        else:
            left.append(each)
    if finished:
        print(f"{finished} of {len(jobs)} jobs are finished already")
    return left


def _return(sweep: Sweep, job: Composed, known: Manifest, outcomes: Mapping[int, engine.Outcome]) -> JobReturn:
    twin = _twin(job, known)
    ran = job.job if twin is None else Job(twin.number, twin.overrides, sweep.folder / twin.folder)
    outcome = outcomes.get(ran.number)
    result = runs.result_of(ran)
    if result is not None and result.get("status") == "finished" and (outcome is None or outcome.state == "finished"):
        return returns.finished(job, result, sweep.options.metric)
    if outcome is None:
        return returns.failed(job, "it was not run")
    told = outcome.reason or ""
    return returns.failed(job, told if outcome.state == "failed" else f"{outcome.state}, {told}", state=outcome.state)


def _twin(job: Composed, known: Manifest) -> Entry | None:
    entry = known.job(job.job.number)
    return None if entry is None or entry.same_as is None else known.job(entry.same_as)


def _manifest(sweep: Sweep, jobs: Sequence[Composed]) -> Manifest:
    config, options = sweep.config, sweep.options
    before = manifest.read(sweep.folder)
    return Manifest(
        name=sweep.folder.name,
        command=tuple(sys.argv),
        script=program(sys.argv[0])[-1],
        config_name=config.hydra.job.config_name,
        overrides=own_overrides(config.hydra.overrides.task),
        metric=options.metric,
        mode=options.mode,
        sweeper=config.hydra.sweeper._target_,
        launcher=config.hydra.launcher._target_,
        started=time.time(),
        version=__version__,
        jobs=tuple(manifest.entries([each.job for each in jobs], sweep.folder, () if before is None else before.jobs)),
    )


def _report(sweep: Sweep, tells: bool) -> None:
    from lora_lightning.cli.sweep_report import report  # matplotlib

    report(sweep.folder, console=None if tells else Console(quiet=True))


def _list_only(sweep: Sweep, jobs: Sequence[Composed]) -> None:
    from lora_lightning.cli.sweep.expected import list_jobs

    list_jobs(jobs, sweep.pool, sweep.folder)
    _remove_what_hydra_wrote(sweep.folder)
    raise SystemExit(0)


def _remove_what_hydra_wrote(folder: Path) -> None:
    """The sweeper has made the folder of a sweep of which nothing is started; one with anything else in it stays."""
    written = folder / "multirun.yaml"
    if folder.is_dir() and {each.name for each in folder.iterdir()} == {written.name}:
        written.unlink()
        folder.rmdir()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell this package's own errors without a traceback, in anybody's script; so with Ctrl-C."""
    try:
        with told():
            yield
    except KeyboardInterrupt as ended:
        print("The sweep was ended. Started again in the same hydra.sweep.dir it goes on where it was", file=sys.stderr)
        raise SystemExit(128 + getattr(ended, "number", signal.SIGINT)) from None
