"""The process in which several jobs of a sweep are trained together: ``python -m lora_lightning.cli.packed FILE``.

The file says which jobs; ``hydra/launcher=lora_packed`` writes it. Each job is run as its own process would run it,
`train` with its own configuration, over a base model and a tokenizer that were loaded once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lightning.sweeps.packed.output import route
from lora_lightning.sweeps.runs import write_whole

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


def main() -> None:
    """Train the jobs of the file that is named on the command line.

    Ends with status 0 where all have finished, with 1 where one has failed, and with 128 + its number after a signal.
    """
    os.environ.setdefault("WANDB_REINIT", "create_new")  # a W&B run of its own for each job, all open at once
    os.environ.setdefault("WANDB_CONSOLE", "off")  # which would hear all of them; each has its job.log
    route()  # before Lightning is imported, whose messages go to the streams that it finds
    from lora_lightning.cli.packing import train_together
    from lora_lightning.cli.told import told

    if len(sys.argv) != 2:
        raise SystemExit("python -m lora_lightning.cli.packed FILE, as hydra/launcher=lora_packed writes one")
    group = GroupFile.read(Path(sys.argv[1]))
    noted: list[int] = []

    def hear(stop: Any) -> None:
        def note(number: int, frame: Any) -> None:
            if noted and number == signal.SIGINT:
                os._exit(128 + number)
            noted.append(number)
            os.write(2, f"\n{signal.Signals(number).name}: the jobs save and end after this step\n".encode())
            stop(number)

        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, note)

    with told():
        failed = train_together(group, hear)
    sys.stdout.flush()
    raise SystemExit(128 + noted[0] if noted else int(failed))


if __name__ == "__main__":
    main()
