"""The folder of a run: whose products lie in it, and that nobody's are written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lora_lightning.errors import LoraConfigError

# Files that a run writes under one name; those of an earlier run are moved aside when it is resumed.
FILES = ("result.json", "metrics.csv", "loss.png", "config.yaml", "hparams.yaml")
_RANKS = ("LOCAL_RANK", "RANK", "GLOBAL_RANK", "SLURM_PROCID", "NODE_RANK")


def is_first_process() -> bool:
    """Whether this is the process that a run's folder belongs to, told before Lightning knows its ranks."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def checkpoint_in(folder: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint to resume from: a file, or with ``last`` the latest one of the run in ``folder``.

    Raises:
        LoraConfigError: There is none.
        AdapterError: It cannot be read, or holds no adapter.
    """
    if ckpt_path is None:
        return None
    from lora_lightning.adapters.checkpoint import read_checkpoint  # torch, without which a command is checked

    path = Path(ckpt_path)
    if ckpt_path == "last":
        found = sorted((folder / "checkpoints").glob("last*.ckpt"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise LoraConfigError(
                f"ckpt_path=last: no checkpoint in {folder / 'checkpoints'}. Name the run to resume with "
                "hydra.run.dir=<its folder>, or a checkpoint file with ckpt_path"
            )
        path = found[-1]
    read_checkpoint(path)
    return path


def claim(folder: Path, *, resuming: bool) -> None:
    """Make sure that a run may write to its folder. Only the first process asks: the others start into the same one.

    Args:
        folder: The run's folder. Hydra has written its ``.hydra`` there already, which counts for nothing.
        resuming: The run goes on with an earlier one. What that one left under a name that is needed again is moved
            aside: ``result.json`` becomes ``result-1.json``.

    Raises:
        LoraConfigError: An earlier run's products lie there and the run does not resume it.
    """
    if not is_first_process():
        return
    if resuming:
        for name in FILES:
            keep(folder / name)
        return
    if products := _products(folder):
        raise LoraConfigError(
            f"{folder} holds an earlier run's {', '.join(products)}, which would be overwritten.\n"
            "  - to go on with that run: add ckpt_path=last\n"
            "  - to start anew: leave hydra.run.dir out, or name another folder with it\n"
            "  - to throw the earlier run away: delete the folder first"
        )


def keep(path: Path) -> None:
    """Move a file aside that is about to be written: ``eval.json`` becomes ``eval-1.json``."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)


def _products(folder: Path) -> list[str]:
    found = [name for name in ("adapter", "checkpoints") if any((folder / name).glob("*"))]
    result = folder / "result.json"
    if result.is_file() and (found or _status(result) == "finished"):
        found.append(result.name)
    return found


def _status(result: Path) -> str | None:
    try:
        return json.loads(result.read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        return None
