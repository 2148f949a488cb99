"""What a Lightning checkpoint says about adapters, and the adapter folder made from one without the base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.distributed import is_distributed, read_distributed
from lora_lightning.adapters.facts import AdapterFacts, describe
from lora_lightning.adapters.files import damage_of
from lora_lightning.adapters.folder import write_folder
from lora_lightning.adapters.joined import joined, with_starts
from lora_lightning.adapters.one_scale import with_one_scale
from lora_lightning.adapters.zero import is_zero, read_whole
from lora_lightning.errors import AdapterError, did_you_mean
from lora_lightning.injection.state import record_of, the_root

CHECKPOINT_KEY = "lora_lightning"
FORMAT = 2
"""Of checkpoints; 2 has optimizer states by the names of parameters."""


def checkpoint_entry(module: nn.Module, attribute: str | None) -> dict[str, Any]:
    """What a checkpoint keeps of one adapter, as primitives: its config, seed and the facts of its folder.

    Args:
        module: The LightningModule.
        attribute: The attribute below which the adapter was injected, or None for all of the module.
    """
    below = module if attribute is None else module.get_submodule(attribute)
    facts = describe(below)
    prefix = f"{attribute}." if attribute else ""
    record = record_of(the_root(below)[1])
    return {
        "module": attribute,
        "lora_config": record.config.to_dict(),
        "seed": record.seed,
        **asdict(
            AdapterFacts(
                facts.config,
                {prefix + name: key for name, key in facts.keys.items()},
                [prefix + name for name in facts.outside],
                facts.record,
                {key: [prefix + name, transposed] for key, (name, transposed) in facts.tied.items()},
            )
        ),
    }


def facts_of(entry: Mapping[str, Any]) -> AdapterFacts:
    """The facts of an adapter's folder, from what a checkpoint keeps of it; names from the LightningModule on."""
    return AdapterFacts(entry["config"], entry["keys"], entry["outside"], entry["record"], entry.get("tied", {}))


def read_checkpoint(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint of ours, a file or a folder of any strategy, onto the CPU with ``weights_only=True``.

    Args:
        path: The checkpoint.
        mapped: Leave the tensors of a file where they are until they are used: for one who wants only some of them.

    Returns:
        What Lightning calls a checkpoint, every tensor whole.

    Raises:
        AdapterError: If it is missing, damaged, or no adapter checkpoint.
    """
    path = Path(path)
    if not (path.is_file() or is_distributed(path) or is_zero(path)):
        raise AdapterError(f"no checkpoint at {path}")
    if reason := damage_of(path):  # torch compares no checksums
        raise AdapterError(f"the checkpoint {path} is damaged: {reason}. Take the one before it")
    try:
        checkpoint = _read(path, mapped)
    except Exception as error:  # torch raises many kinds for a file that is cut off, damaged or holds code
        raise AdapterError(f"{path} cannot be read with weights_only=True: {error}") from error
    entries_of(checkpoint, str(path))
    if (form := checkpoint[CHECKPOINT_KEY].get("format")) != FORMAT:
        raise AdapterError(f"{path} has checkpoint format {form}, this version reads format {FORMAT}")
    return checkpoint


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    if is_distributed(path):
        return read_distributed(path)
    if is_zero(path):
        return read_whole(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def entries_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """The adapters that a checkpoint describes, by name.

    Raises:
        AdapterError: If it describes none.
    """
    entries = checkpoint.get(CHECKPOINT_KEY, {}).get("adapters") if isinstance(checkpoint, Mapping) else None
    if not entries:
        raise AdapterError(
            f"{source} was not written with a LoraCallback: it has no {CHECKPOINT_KEY!r} entry. To start from the "
            "weights of a full checkpoint, load them into the base model before training"
        )
    return entries


def adapter_from_checkpoint(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str = "default",
    overwrite: bool = False,
    fold_scaling: bool = False,
) -> Path:
    """Write the adapter folder of a checkpoint, without the base model.

    Args:
        path: A ``.ckpt`` file written under a ``LoraCallback``.
        folder: Where to; None makes ``NAME-adapter`` beside ``NAME.ckpt``.
        name: Which adapter, where the run had several.
        overwrite: Replace an adapter that is in the folder already.
        fold_scaling: As :func:`save_adapter` has it, for servers that know one scale alone.

    Returns:
        The folder.

    Raises:
        AdapterError: If the checkpoint is no adapter checkpoint or lacks some of one, or the folder holds an adapter.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, mapped=True)
    entries = entries_of(checkpoint, str(path))
    if name not in entries:
        raise AdapterError(f"no adapter {name!r}{did_you_mean(name, entries)} in {path}: it has {', '.join(entries)}")
    entry = entries[name]
    facts = facts_of(entry)
    wanted = with_starts([*facts.keys, *facts.outside], checkpoint["state_dict"])
    if absent := sorted(set(wanted) - checkpoint["state_dict"].keys()):
        raise AdapterError(f"{path} describes the adapter {name!r} and lacks values of it: {', '.join(absent[:4])}")
    state: dict[str, Tensor] = {key: checkpoint["state_dict"][key] for key in wanted}
    if fold_scaling:
        facts, state = with_one_scale(facts, joined(state))
    return write_folder(facts, state, folder or path.with_name(f"{path.stem}-adapter"), overwrite=overwrite)
