"""Which checkpoint of a folder a run goes on with: the newest one that is whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_lightning.adapters.distributed import META
from lora_lightning.adapters.files import MANIFEST, REPLACED, damage_of
from lora_lightning.adapters.zero import WHOLE, is_zero


class _Candidate(NamedTuple):
    path: Path
    step: int | None
    written: float


def newest_whole(folder: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in a folder that training can be resumed from.

    The newest is the one of the highest step, and of two with one step the one that was written later; where a step
    cannot be read, only the time counts. A damaged one, and one that holds weights only, is passed over with a warning
    that says why. Files of a killed process that were never finished are no candidates.

    Args:
        folder: Where ``*.ckpt`` files and checkpoint folders lie; it need not exist.
        *more: Further candidates.

    Returns:
        Its path, or None where there is none.
    """
    candidates = []
    for path in _candidates(Path(folder), map(Path, more)):
        facts = _facts_of(path)
        if facts is None and (reason := damage_of(path)) is not None:
            _pass_over(path, reason)
        elif facts is not None and "optimizer_states" not in facts:
            _pass_over(path, "it holds weights only (save_weights_only=True)")
        else:
            step = None if facts is None else facts.get("global_step")
            candidates.append(_Candidate(path, step if isinstance(step, int) else None, _written(path)))
    by_step = all(each.step is not None for each in candidates)
    candidates.sort(key=lambda each: (each.step or 0 if by_step else 0, each.written), reverse=True)
    for each in candidates:
        if (reason := damage_of(each.path)) is None:
            return each.path
        _pass_over(each.path, reason)
    return None


def _candidates(folder: Path, more: Iterable[Path]) -> list[Path]:
    found = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
    return [
        path
        for path in [*found, *more]
        if path.name.removesuffix(REPLACED).endswith(".ckpt")
        or any((path / name).exists() for name in (MANIFEST, META))
    ]


def _facts_of(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content without reading its tensors, or None where that is not to be had without running code."""
    try:
        content = torch.load(_file_of(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds; whether it is damaged is asked in another way
        return None
    return content if isinstance(content, dict) else None


def _file_of(path: Path) -> Path:
    if path.is_dir():
        return path / (WHOLE if is_zero(path) else META)
    return path


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _pass_over(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is passed over: {reason}", stacklevel=4)
