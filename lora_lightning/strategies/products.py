"""The adapter folders that a fit leaves, and where there is room for them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.adapters.checkpoint import adapter_from_checkpoint, facts_of
from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.adapters.folder import write_folder
from lora_lightning.errors import AdapterError


def write_adapter(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    folder: str,
    name: str,
    entry: dict[str, Any],
    state: dict[str, Tensor],
) -> Path:
    """Write the adapter as it is now.

    Args:
        trainer: Of the fit.
        pl_module: Whose tokenizer goes with it.
        folder: Of the run; the adapter goes to ``adapter`` in it, one with a name of its own below that.
        name: The adapter's.
        entry: What a checkpoint says of it.
        state: Its tensors, whole.

    Returns:
        Its folder.
    """
    place = local_folder(folder) / "adapter"
    place = free_place(place if name == "default" else place / name)
    written = write_folder(facts_of(entry), state, place)
    save_tokenizer(trainer, pl_module, place)
    return written


def write_best(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Path | None:
    """Write the adapter of the best checkpoint beside it; None where there is none, or none on this machine."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        return None
    if not Path(best).exists():
        rank_zero_warn(f"the best checkpoint, {best}, is no local file: its adapter is not written beside it")
        return None
    suffix = "" if name == "default" else f"-{name}"
    beside = free_place(Path(best).with_name(f"{Path(best).stem}-adapter{suffix}"))
    written = adapter_from_checkpoint(best, beside, name=name)
    save_tokenizer(trainer, pl_module, beside)
    return written


def local_folder(folder: str) -> Path:
    """A folder as a path of this machine.

    Raises:
        AdapterError: If it is somewhere else (``s3://…``), where an adapter's files cannot be put together.
    """
    if not isinstance(files := get_filesystem(folder), LocalFileSystem):
        raise AdapterError(
            f"the adapter cannot be written to {folder}, which is remote: give the logger a local folder, or the "
            "Trainer a local default_root_dir (checkpoints may be remote by ModelCheckpoint(dirpath=…))"
        )
    return Path(files._strip_protocol(os.fspath(folder)))


def free_place(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3`` … that holds no adapter: nothing is written over."""
    taken, number = path, 1
    while (path / WEIGHTS_FILE).exists():
        number += 1
        path = taken.with_name(f"{taken.name}-{number}")
    if path != taken:
        warnings.warn(f"{taken} holds an adapter already; this one goes to {path}", stacklevel=3)
    return path


def save_tokenizer(trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> None:
    """Put the tokenizer into a folder, where the LightningModule or the data module has one that can be saved."""
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        save = getattr(getattr(owner, "tokenizer", None), "save_pretrained", None)
        if callable(save):
            save(folder)
            return
