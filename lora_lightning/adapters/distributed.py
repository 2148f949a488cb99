"""The distributed form of a checkpoint: a folder to which every process writes its own part of the tensors.

torch's distributed checkpoint format holds the tensors of ``state_dict`` and ``optimizer_states``, and ``meta.pt`` all
the rest, as in the folders that Lightning writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

META = "meta.pt"
_PARTS = ("state_dict", "optimizer_states")
_SEPARATOR = "\x1f"  # between the keys of a path: no name has it


def is_distributed(path: Path) -> bool:
    """Whether a folder is a checkpoint in distributed form."""
    return (path / META).is_file() and (path / ".metadata").is_file()


def write_distributed(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write this process's part of a checkpoint; call it on every process. A tensor that all have is written once.

    Args:
        checkpoint: As Lightning makes it; tensors may be ``DTensor``.
        folder: Exists, and is the same on every process.
    """
    tensors = dict(_tensors({part: checkpoint[part] for part in _PARTS if part in checkpoint}))
    save({_SEPARATOR.join(keys): value for keys, value in tensors.items()}, storage_writer=FileSystemWriter(folder))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(_without(checkpoint, tensors), folder / META)


def read_distributed(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, its tensors whole and on the CPU; every process may read it by itself."""
    checkpoint = torch.load(folder / META, map_location="cpu", weights_only=True)
    reader = FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(kind.size, dtype=kind.properties.dtype)
        for key, kind in known.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    for key, value in tensors.items():
        *path, last = key.split(_SEPARATOR)
        place = checkpoint
        for step in path:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place[last] = value
    return checkpoint


def _tensors(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Tensors in nested dicts and lists that are worth a place of their own; numbers in tensor form stay."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield path, value
    elif isinstance(value, (Mapping, list)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, (*path, str(key)))


def _without(value: Any, tensors: Mapping[tuple[str, ...], Tensor], path: tuple[str, ...] = ()) -> Any:
    if isinstance(value, Mapping) and (not path or path[0] in _PARTS):
        items = ((key, (*path, str(key)), item) for key, item in value.items())
        return {key: _without(item, tensors, at) for key, at, item in items if at not in tensors}
    if isinstance(value, list) and path and path[0] in _PARTS:
        return [_without(item, tensors, (*path, str(i))) for i, item in enumerate(value)]
    return value
