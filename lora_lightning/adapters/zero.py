"""The form of a checkpoint under DeepSpeed: its engine's folder, and in it a file of ours with everything whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TAG = "checkpoint"
"""Of the part that DeepSpeed's engine writes and reads, and the name of its folder; as Lightning calls it."""
WHOLE = "adapters.pt"


def is_zero(path: Path) -> bool:
    """Whether a folder is such a checkpoint."""
    return (path / WHOLE).is_file()


def write_whole(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint, every tensor whole; one process does so."""
    torch.save(checkpoint, folder / WHOLE)


def read_whole(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, its tensors on the CPU; DeepSpeed is not needed."""
    return torch.load(folder / WHOLE, map_location="cpu", weights_only=True)
