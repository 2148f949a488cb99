"""The jobs of a sweep, and what can be read of one from its folder alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWEEP = "LORA_LIGHTNING_SWEEP"
"""Environment variable of a job's processes: the folder of the sweep that it belongs to."""
JOB = "LORA_LIGHTNING_JOB"
"""Environment variable of a job's processes: its number in the sweep."""
RESULT, PROGRESS, LOG = "result.json", "progress.json", "job.log"
"""Files in a job's folder: what came out, how far it is, what it has printed."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        number: Hydra's number of the job.
        overrides: What sets it apart: the job's own settings, as the sweeper gave them.
        folder: Where it leaves everything; absolute.
        devices: How many devices (GPUs, or processes on a CPU) it trains on.
        accelerator: ``"cpu"`` or ``"gpu"``.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    devices: int = 1
    accelerator: str = "cpu"

    @property
    def log(self) -> Path:
        """Where what it prints goes."""
        return self.folder / LOG


@dataclass(frozen=True)
class Work:
    """A process to start: of one job, or of several that are trained together.

    Attributes:
        jobs: Whose work it is.
        command: The program and its arguments.
        log: Where what it prints goes.
        environment: More variables for it.
    """

    jobs: tuple[Job, ...]
    command: tuple[str, ...]
    log: Path
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def devices(self) -> int:
        """How many devices it needs at once."""
        return max(job.devices for job in self.jobs)


def current_sweep() -> Path | None:
    """The folder of the sweep that this process is a job of, or None."""
    folder = os.environ.get(SWEEP)
    return Path(folder) if folder else None


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, or None where it is missing, broken off or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def result_of(job: Job) -> dict[str, Any] | None:
    """What a job has left as its result, whole; None where there is none, or it is another job's."""
    result = read_json(job.folder / RESULT)
    if result is None or not set(job.overrides) <= set(result.get("overrides") or ()):
        return None
    return result


def is_finished(job: Job) -> bool:
    """Whether a job need not be run again."""
    result = result_of(job)
    return result is not None and result.get("status") == "finished"
