"""What a run leaves beside an adapter's own files, and where there is room for it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem

from lora_lightning.adapters.folder import WEIGHTS_FILE
from lora_lightning.errors import AdapterError


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
