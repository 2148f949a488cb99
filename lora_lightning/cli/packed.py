"""The process in which several jobs of a sweep are trained together: ``python -m lora_lightning.cli.packed FILE``.

The file says which jobs; ``hydra/launcher=lora_packed`` writes it. Each job is run as its own process would run it,
`train` with its own configuration, over a base model and a tokenizer that were loaded once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lora_lightning.cli.group_file import GroupFile
from lora_lightning.sweeps.packed.output import route


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
