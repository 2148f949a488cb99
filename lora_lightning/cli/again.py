"""The command that runs the same once more, for the page of a run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from hydra.core.hydra_config import HydraConfig

from lora_lightning.cli.overrides import program
from lora_lightning.cli.sweep.command import settings_in


def command_again(
    overrides: Sequence[str], argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> str:
    """What is typed to run the same once more, in a folder of its own: a finished run is not written over.

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
    flags, of_hydra = settings_in(argv)
    return f"{_started(argv[0], environment)} {shlex.join([*flags, *of_hydra, *overrides])}".strip()


def _started(path: str, environment: Mapping[str, str]) -> str:
    called = program(path)
    if "TORCHELASTIC_RUN_ID" not in environment:
        return called.replace("python -m lora_lightning.cli.", "lora-lightning ")
    nodes = environment.get("GROUP_WORLD_SIZE", "1")
    several = f" --nnodes={nodes}" if nodes != "1" else ""
    return f"torchrun --nproc-per-node={environment['LOCAL_WORLD_SIZE']}{several} {called.removeprefix('python ')}"
