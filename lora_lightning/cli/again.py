"""The command that runs the same once more: for the page of a run, and with other settings for one out of memory."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from hydra.core.hydra_config import HydraConfig

from lora_lightning.cli.overrides import program
from lora_lightning.cli.sweep.command import settings_in
from lora_lightning.sweeps.runs import SWEEP

_GOING_ON = {"resume=auto", "ckpt_path=last"}


def command_again(
    overrides: Sequence[str], argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> str:
    """What is typed to run the same once more, in a folder of its own: a run is not written over.

    What goes on with the run of a folder does so there; but a job of a sweep is run alone.

    Args:
        overrides: The settings of the run.
        argv: How this process was started, or the sweep that has the run as a job; None: ``sys.argv``, whose
            arguments are Hydra's where Hydra has read them.
        environment: Of this process, which tells whether torchrun has started it.

    >>> command_again(["data.path=my rows.jsonl"], ["scripts/train.py", "--config-dir", "mine"], {})
    "python scripts/train.py --config-dir mine 'data.path=my rows.jsonl'"
    """
    if argv is None:
        argv = sys.argv if HydraConfig.initialized() else sys.argv[:1]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            flags, of_hydra = settings_in(argv)
    except SystemExit:  # of another program, which calls `train` itself: a notebook's kernel, a launcher of one's own
        flags, of_hydra = [], []
    goes_on = SWEEP not in environment and not _GOING_ON.isdisjoint(overrides)
    place = [word for word in argv if goes_on and word.startswith("hydra.run.dir=")]
    return f"{_started(argv[0], environment)} {shlex.join([*flags, *of_hydra, *place, *overrides])}".strip()


def _started(path: str, environment: Mapping[str, str]) -> str:
    called = program(path)
    if "TORCHELASTIC_RUN_ID" not in environment:
        return called.replace("python -m lora_lightning.cli.", "lora-lightning ")
    nodes = environment.get("GROUP_WORLD_SIZE", "1")
    several = f" --nnodes={nodes}" if nodes != "1" else ""
    return f"torchrun --nproc-per-node={environment['LOCAL_WORLD_SIZE']}{several} {called.removeprefix('python ')}"
