"""A LightningModule with its adapter, from a checkpoint."""

from __future__ import annotations

import inspect
import os
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lora_lightning.adapters.checkpoint import entries_of, read_checkpoint
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.folder import warn_of_other_base
from lora_lightning.adapters.merge import fold_in
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection import check_config
from lora_lightning.injection.inject import inject_ahead
from lora_lightning.injection.state import load_lora_state, record_of, the_root

Module = TypeVar("Module", bound=pl.LightningModule)


def load_from_checkpoint(module_class: type[Module], ckpt_path: str | os.PathLike[str], **init_args: Any) -> Module:
    """Build a LightningModule, inject the adapter that a checkpoint describes, and load it.

    Lightning's own ``load_from_checkpoint`` knows no callbacks: it would give the base model without the adapter.

    Args:
        module_class: The module's class.
        ckpt_path: A ``.ckpt`` file written under a ``LoraCallback``; read with ``weights_only=True``.
        **init_args: Arguments of the class; those left out are taken from the checkpoint's ``hyper_parameters``
            (plain values only: pass a network itself).

    Returns:
        The module in eval mode, its adapter frozen.

    Raises:
        AdapterError: If the checkpoint has no adapter, does not fit, or an argument is missing.
    """
    checkpoint = read_checkpoint(ckpt_path)
    arguments = _accepted(module_class, checkpoint.get("hyper_parameters", {})) | init_args
    try:
        module = module_class(**arguments)
    except TypeError as error:
        raise AdapterError(
            f"{module_class.__name__} cannot be built from the checkpoint's hyper_parameters "
            f"({', '.join(arguments) or 'none'}): {error}. Pass what is missing to load_from_checkpoint"
        ) from error
    if is_overridden("configure_model", module):
        module.configure_model()
    for entry in entries_of(checkpoint, str(ckpt_path)).values():
        _inject(module, entry, str(ckpt_path))
    module.on_load_checkpoint(checkpoint)
    load_lora_state(module, checkpoint["state_dict"], str(ckpt_path))
    module.requires_grad_(False)
    return module.eval()


def _inject(module: pl.LightningModule, entry: dict[str, Any], source: str) -> None:
    config = LoraConfig.from_dict(entry["lora_config"])
    try:
        check_config(_target(module, entry), config)
    except (LoraConfigError, AttributeError) as error:
        if not is_overridden("setup", module):
            raise AdapterError(f"{source} does not fit this {type(module).__name__}: {error}") from error
        module.setup("predict")  # the network is built there
    target = _target(module, entry)
    for folder in entry["record"].get("bases", ()):
        fold_in(target, folder)
    inject_ahead(target, config, seed=entry["seed"])
    root = the_root(target)[1]
    record_of(root).bases = tuple(entry["record"].get("bases", ()))
    warn_of_other_base(entry["record"], fingerprint(root), source)


def _target(module: pl.LightningModule, entry: dict[str, Any]) -> nn.Module:
    return module if entry["module"] is None else module.get_submodule(entry["module"])


def _accepted(module_class: type, values: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module_class).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {key: value for key, value in values.items() if not key.startswith("_")}
    return {key: value for key, value in values.items() if key in parameters}
