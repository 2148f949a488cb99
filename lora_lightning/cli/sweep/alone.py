"""A job under a launcher that is not one of ours: it runs as a process of its own there too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_lightning.cli.sweep.again import to_go_on
from lora_lightning.cli.sweep.command import JobFailed, run_alone
from lora_lightning.cli.sweep.compose import own_overrides
from lora_lightning.cli.sweep.elsewhere import enter
from lora_lightning.cli.sweep.places import refuse_machines
from lora_lightning.cli.sweep.returns import value_of
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import runs
from lora_lightning.sweeps.processes import wait_for_earlier


def run_in_process(cfg: DictConfig, started: Sequence[str]) -> Any:
    """What the job that Hydra is at comes to; one that is finished already is not run again.

    Args:
        cfg: Its configuration.
        started: The command line of the sweep.

    Raises:
        JobFailed: It has ended with an error; or it was not started, since its folder is in that of another sweep, it
            is to train on several machines, or what an earlier start has left running does not end.
    """
    hydra = HydraConfig.get()
    overrides = tuple(hydra.overrides.task)
    folder, cwd = Path(hydra.runtime.output_dir), Path(hydra.runtime.cwd)
    job, sweep = runs.Job(hydra.job.num, own_overrides(overrides), folder), cwd / hydra.sweep.dir
    try:
        refuse_machines(cfg)
        enter(job, sweep, cfg, hydra, started)
    except LoraConfigError as error:  # which Hydra would tell with a traceback
        raise JobFailed(str(error)) from None
    if wait_for_earlier([job], print):  # a job that a cluster has put into its queue again may still be saving
        raise JobFailed(f"Job {job.number}: a process of an earlier start still runs in {folder}. End it first")
    if runs.is_finished(job):
        print(f"Job {job.number} is finished already: {folder}")
        result = runs.result_of(job) or {}
    else:
        print(f"Job {job.number} writes into {job.log}", flush=True)
        again = to_go_on(folder, cfg)
        result = run_alone((*overrides, *again), folder, sweep=sweep, number=job.number, argv=started)
    return value_of(result, cfg.get("optimized_metric"))
