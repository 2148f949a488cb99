"""What a process that trains several jobs together is told to do, in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lightning.reports.whole import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Packed:
    """One job of the process.

    Attributes:
        number: Its number in the sweep.
        folder: Its folder.
        arguments: Those of the command that would run it by itself, without the program.
        log: Where what it prints goes.
    """

    number: int
    folder: str
    arguments: tuple[str, ...]
    log: str


@dataclass(frozen=True)
class GroupFile:
    """What the process has to do.

    Attributes:
        jobs: The jobs.
        places: How many of them train at once; None: as many as fit into memory.
        shared_by: How many such processes share the memory of the device.
        halving: As ``sweep.halving``.
        metric: What jobs are compared by.
        mode: ``min`` or ``max``.
        among: What the jobs have in common with those that they are compared with, in a few signs.
        earlier: Folders of all jobs of the sweep, which may have come to rungs at another time, by number.
    """

    jobs: tuple[Packed, ...]
    places: int | None = None
    shared_by: int = 1
    halving: Any = False
    metric: str | None = None
    mode: str = "min"
    among: str = ""
    earlier: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write it, whole or not at all."""
        content = {"format": FORMAT} | vars(self) | {"jobs": [vars(job) for job in self.jobs]}
        return write_whole(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> GroupFile:
        """Read what `write` has written."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if (version := content.pop("format")) != FORMAT:
            raise SystemExit(f"{path} has format {version}, and format {FORMAT} is understood here")
        jobs = (Packed(**job | {"arguments": tuple(job["arguments"])}) for job in content.pop("jobs"))
        return cls(tuple(jobs), **content)
