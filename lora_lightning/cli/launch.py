"""From the command line to a job: check what was typed, then let Hydra compose the configuration and run it."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_lightning.cli.clusters import quieten_hydra
from lora_lightning.cli.overrides import check_command
from lora_lightning.cli.run_folder import is_first_process
from lora_lightning.cli.sweep.command import refuse_ranks
from lora_lightning.cli.told import told
from lora_lightning.conf import CONFIGS

Job = Callable[[DictConfig], Any]


def launch(config_name: str, job: Job, *, command: str | None = None) -> None:
    """Run a job with the settings in ``sys.argv``.

    Args:
        config_name: The primary configuration: ``train`` or ``eval``.
        job: What to run, once for each job of a multirun.
        command: How the program is called, where ``sys.argv[0]`` does not say it.
    """
    for stream in (sys.stdout, sys.stderr):  # into a file or a pipe too, what is said is to be seen when it is said
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    with told():
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            refuse_ranks(os.environ)
        if is_first_process():  # the others were started with what has been checked
            check_command(sys.argv, config_name, command=command)
    # Under a launcher that moves jobs to other processes, those have a command line of their own.
    started = [os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    quieten_hydra()
    try:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(_telling(job, started))()
    finally:
        _leave_group_if_distributed()
        _report()


def _report() -> None:
    elsewhere = sys.modules.get("lora_lightning.cli.sweep.elsewhere")  # of a multirun only
    if elsewhere is not None:
        with told():
            elsewhere.report_on_begun()


def _leave_group_if_distributed() -> None:
    """Have a process of several leave its group where Python ends, with or without a `LoraCallback` in it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from lora_lightning.strategies.ending import leave_group_at_exit

        leave_group_at_exit()


def _telling(job: Job, started: list[str]) -> Job:
    @functools.wraps(job)
    def run(cfg: DictConfig) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # under a launcher that is not one of ours
            from lora_lightning.cli.sweep.alone import run_in_process

            return run_in_process(cfg, started)
        with told():
            return job(cfg)

    return run
