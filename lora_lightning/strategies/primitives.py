"""Checkpoints that ``torch.load(weights_only=True)`` reads: hyper-parameters brought down to plain values."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any

_PARTS = ("hyper_parameters", "datamodule_hyper_parameters")
_TYPES = ("hparams_type",)
_PLAIN = (bool, int, float, str)
_NOTHING = object()


def keep_primitives(checkpoint: dict[str, Any]) -> list[str]:
    """Bring a checkpoint's hyper-parameters to plain values in place; what cannot be one leaves.

    Modules, partials, tensors and other objects leave; OmegaConf containers become dicts and lists, paths strings,
    enumerations their values.

    Returns:
        The names of what left.
    """
    dropped: list[str] = []
    for part in _PARTS:
        if part in checkpoint:
            checkpoint[part] = {
                key: plain
                for key, value in dict(checkpoint[part]).items()
                if (plain := _plain(value, str(key), dropped)) is not _NOTHING
            }
    for key in _TYPES:  # a class, which stands for the OmegaConf container that has just become a dict
        checkpoint.pop(key, None)
    return dropped


def _plain(value: Any, name: str, dropped: list[str]) -> Any:
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, name, dropped)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, _PLAIN):  # a subclass, such as numpy's float64 or a string of OmegaConf
        return next(kind(value) for kind in _PLAIN if isinstance(value, kind))
    if isinstance(value, Mapping):
        items = {key: _plain(item, f"{name}.{key}", dropped) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _NOTHING}
    if isinstance(value, Sequence):
        parts = [_plain(item, f"{name}[{i}]", dropped) for i, item in enumerate(value)]
        return [item for item in parts if item is not _NOTHING]
    dropped.append(name)
    return _NOTHING
