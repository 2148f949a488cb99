"""The folder of a run: whose products lie in it, and that nobody's are written over."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

from lora_lightning.errors import LoraConfigError

# Files that a run writes under one name; those of an earlier run are moved aside when it is resumed.
FILES = (
    "result.json",
    "metrics.csv",
    "loss.png",
    "insight.png",
    "advice.md",
    "config.yaml",
    "hparams.yaml",
    "about.json",
)
_RANKS = ("LOCAL_RANK", "RANK", "GLOBAL_RANK", "SLURM_PROCID", "NODE_RANK")


def is_first_process() -> bool:
    """Whether this is the process that a run's folder belongs to, told before Lightning knows its ranks."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def checkpoint_in(folder: Path, ckpt_path: str | None, resume: str | None = None) -> Path | None:
    """The checkpoint to go on with: a file, or the newest whole one of the run in ``folder``.

    A job that SLURM has requeued goes on by itself, whatever it was started from.

    Args:
        folder: The run's folder.
        ckpt_path: A checkpoint, or ``last`` for the newest of the folder, which has to be there then.
        resume: ``auto`` for the newest of the folder, if there is one.

    Raises:
        LoraConfigError: There is none, or what is asked for contradicts itself.
        AdapterError: It cannot be read, or holds no adapter.
    """
    if resume not in (None, "auto"):
        raise LoraConfigError(
            f"resume must be auto or null, got {resume!r}; a checkpoint of your own: ckpt_path={resume}"
        )
    if resume and ckpt_path:
        raise LoraConfigError(f"resume=auto looks for a checkpoint, and ckpt_path={ckpt_path} names one: leave one out")
    requeued = is_requeued()
    if ckpt_path is None and resume is None and not requeued:
        return None
    from lora_lightning.adapters.checkpoint import read_checkpoint  # torch, without which a command is checked

    path = None
    if requeued or resume or ckpt_path == "last":
        path = _newest(folder)
        why = f"resume={resume}" if resume else "Requeued by SLURM" if requeued else "ckpt_path=last"
        if is_first_process():
            print(f"{why}: {f'going on with {path}' if path else f'no whole checkpoint in {folder} yet'}")
    if path is None and ckpt_path == "last":
        raise LoraConfigError(
            f"ckpt_path=last: no whole checkpoint in {folder / 'checkpoints'}. Name the run to resume with "
            "hydra.run.dir=<its folder>, or a checkpoint file with ckpt_path"
        )
    if path is None and ckpt_path is not None:
        path = Path(ckpt_path)  # where the job began
    if path is not None:
        read_checkpoint(path)
    return path


def is_requeued() -> bool:
    """Whether SLURM has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _newest(folder: Path) -> Path | None:
    from lora_lightning.adapters.files import remove_leftovers
    from lora_lightning.adapters.newest import newest_whole

    if is_first_process():
        for place in (folder, folder / "checkpoints"):
            remove_leftovers(place)
    with warnings.catch_warnings():
        if not is_first_process():
            warnings.simplefilter("ignore")  # the first one warns for all
        # Lightning writes into the folder itself when SLURM gives it a sign.
        return newest_whole(folder / "checkpoints", *folder.glob("hpc_ckpt_*.ckpt"))


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
            "  - to go on with that run: add resume=auto\n"
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


def kept(path: Path) -> list[Path]:
    """What :func:`keep` has moved aside of a file, oldest first."""
    names = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    numbered = [(int(found[1]), aside) for aside in path.parent.iterdir() if (found := names.fullmatch(aside.name))]
    return [aside for _, aside in sorted(numbered)]


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
