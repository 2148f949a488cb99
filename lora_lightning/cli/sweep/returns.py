"""What the sweeper gets back for each job."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lora_lightning.cli.sweep.command import JobFailed
from lora_lightning.cli.sweep.compose import Composed


def finished(job: Composed, result: Mapping[str, Any], metric: str | None) -> JobReturn:
    """The return of a job that has left a result.

    Args:
        job: The job.
        result: Its ``result.json``.
        metric: What jobs are compared by; None: what the job's function has returned.
    """
    returned = _returned(job)
    returned.status = JobStatus.COMPLETED
    returned.return_value = value_of(result, metric)
    return returned


def failed(job: Composed, reason: str, *, state: str = "failed") -> JobReturn:
    """The return of a job that has failed, was interrupted or not started; what it returned raises `JobFailed`."""
    returned = _returned(job)
    returned.status = JobStatus.FAILED
    returned.return_value = JobFailed(f"Job {job.job.number} ({' '.join(job.job.overrides)}): {reason}", state=state)
    return returned


def value_of(result: Mapping[str, Any], metric: str | None) -> Any:
    """What a job comes to; a metric that was no number is NaN, since JSON has none.

    >>> value_of({"val_loss": 2.5}, "val_loss")
    2.5
    >>> value_of({"value": "a text"}, None)
    'a text'
    """
    if metric is None:
        return result.get("value")
    value = result.get(metric, result.get("value"))
    return math.nan if value is None else value


def _returned(job: Composed) -> JobReturn:
    returned = JobReturn()
    returned.overrides = list(job.config.hydra.overrides.task)
    returned.cfg = job.settings
    returned.hydra_cfg = job.config.copy()  # of Hydra's own launchers it holds all settings as well
    returned.working_dir = os.getcwd()
    returned.task_name = OmegaConf.select(job.config, "hydra.job.name")
    return returned
