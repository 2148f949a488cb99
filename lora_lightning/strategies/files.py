"""Lightning's way to checkpoint files, made to write them whole or not at all."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO, async_plugin
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lora_lightning.adapters.files import atomic_save


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints aside, flushes and renames them; remote ones in Lightning's way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            AdapterError: If a local file cannot be written; the one before is whole.
        """
        if storage_options is not None or not isinstance(files := get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            atomic_save(checkpoint, files._strip_protocol(os.fspath(path)))


def use_atomic_io(strategy: Strategy) -> None:
    """Let a strategy write through :class:`AtomicCheckpointIO`, where it would through Lightning's own default.

    A checkpoint IO that the user gave stays, and so does one that wraps Lightning's, with ours inside it.
    """
    outer: CheckpointIO | None = strategy.checkpoint_io
    if type(outer) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    while isinstance(outer, _WrappingCheckpointIO):
        if isinstance(outer, AsyncCheckpointIO):
            vars(outer)["remove_checkpoint"] = functools.partial(_remove_in_turn, outer)
            if not hasattr(async_plugin, "_clone_tensor"):  # Lightning 2.5
                vars(outer)["save_checkpoint"] = functools.partial(_save_a_copy, outer)
        if type(outer.checkpoint_io) is TorchCheckpointIO:
            outer._checkpoint_io = AtomicCheckpointIO()
        outer = outer.checkpoint_io


def _remove_in_turn(io: AsyncCheckpointIO, *args: Any, **kwargs: Any) -> None:
    """Remove a checkpoint only once those that were to be saved before are: they may have to stand in for it."""

    def remove() -> None:
        if io._error is None and io.checkpoint_io is not None:
            io.checkpoint_io.remove_checkpoint(*args, **kwargs)

    if (ensure_setup := getattr(io, "_ensure_setup", None)) is not None:  # Lightning 2.5 has its thread from the start
        ensure_setup()
    io._executor.submit(remove)  # type: ignore[union-attr]  # made by now; one thread, so in order


def _save_a_copy(io: AsyncCheckpointIO, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Save what the tensors are now, since training goes on and changes them while the other thread writes."""
    copied = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())
    type(io).save_checkpoint(io, copied, *args, **kwargs)
