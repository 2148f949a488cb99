"""A sweep that is started again: what of its jobs is there already, and how the others go on."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lora_lightning.sweeps.processes import LOCK
from lora_lightning.sweeps.study import NOTE

_OF_THE_START = {".hydra", LOCK, NOTE}


def to_go_on(folder: Path, config: DictConfig) -> tuple[str, ...]:
    """The overrides that let a job go on with what an earlier attempt has left in its folder, if it has left anything.

    Args:
        folder: The job's folder.
        config: Its configuration. A script without our ``resume`` starts anew: how it goes on is for it to say.
    """
    if "resume" not in config or "ckpt_path" not in config or config.resume is not None:
        return ()
    if not folder.is_dir() or all(each.name in _OF_THE_START or each.suffix == ".log" for each in folder.iterdir()):
        return ()
    if config.ckpt_path is None:
        return ("resume=auto",)
    # It began with a checkpoint of another run, which counts no more once it has some of its own.
    return ("ckpt_path=null", "resume=auto") if any((folder / "checkpoints").glob("*")) else ()
