"""``adapter_config.json``: PEFT's file, written so that PEFT reads it, read so that nothing in it is passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from lora_lightning.adapters.joined import joined_config
from lora_lightning.adapters.peft_names import short_targets
from lora_lightning.config import ALL_LINEAR, TASK_HEADS, LoraConfig
from lora_lightning.config_starts import PISSA_NITER
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection.matching import matches
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import lora_layers, record_of

_LOG = logging.getLogger(__name__)
# What PEFT writes about the adapter rather than into it.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
# Values with which a field of PEFT's that is not ours does nothing.
_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}


def to_peft_config(root: nn.Module) -> dict[str, Any]:
    """PEFT's config of an injected root, its keys sorted; the layers are named so that PEFT finds the same ones."""
    record = record_of(root)
    values = joined_config(record.config.to_dict())
    if values["target_modules"] == ALL_LINEAR or _skipped_some(root, record.config):
        # Resolved: what a reader calls linear, or may skip, need not be what was adapted here.
        values["target_modules"] = short_targets(root)
        values["layers_to_transform"] = values["layers_pattern"] = None
    elif isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    values["target_parameters"] = sorted(values["target_parameters"] or []) or None
    names = [name for name, _ in canonical_modules(root) if name]
    wanted = [*(values["modules_to_save"] or []), *TASK_HEADS.get(record.config.task_type or "", ())]
    found = [entry for entry in wanted if any(matches([entry], name) for name in names)]
    values["modules_to_save"] = sorted(set(_unmistakable(found, names))) or None
    values["fan_in_fan_out"] = any(layer.lora_kind == "Conv1D" for _, layer in lora_layers(root))
    values["lora_alpha"] = int_if_whole(values["lora_alpha"])
    values["alpha_pattern"] = {key: int_if_whole(value) for key, value in values["alpha_pattern"].items()}
    values |= {
        "auto_mapping": None,
        "base_model_name_or_path": _base_of(root),
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
    }
    return dict(sorted(values.items()))


def _base_of(root: nn.Module) -> str | None:
    """The base as PEFT finds it: a folder below the current one as ``./name``, which no model on the Hub is called."""
    name = getattr(root, "name_or_path", None) or None
    below = name is not None and os.path.isdir(name) and not (os.path.isabs(name) or name.startswith("."))
    return f"./{name}" if below else name


def from_peft_config(values: Mapping[str, Any], root: nn.Module, source: str) -> LoraConfig:
    """Our config of what PEFT (or :func:`to_peft_config`) wrote.

    Args:
        values: Content of ``adapter_config.json``.
        root: The model it is for: names in a list that this model lacks are dropped and told, as PEFT allows them.
        source: What to call the file in a message.

    Raises:
        AdapterError: If the adapter is not LoRA, or a setting is in force that is not known here.
    """
    if values.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{source} holds an adapter of type {values['peft_type']}, not LORA")
    ours = {entry.name for entry in fields(LoraConfig)}
    foreign = {key: value for key, value in values.items() if key not in ours and key not in _ABOUT}
    in_force = {key: value for key, value in foreign.items() if value and value != _DEFAULTS.get(key)}
    if in_force:
        listed = "".join(f"\n  - {key}: {value!r}" for key, value in sorted(in_force.items()))
        raise AdapterError(f"{source} asks for what is not known here:{listed}")
    if foreign:
        _LOG.info("%s: passed over, not in force: %s", source, ", ".join(sorted(foreign)))
    if values.get("target_modules") is None:
        raise AdapterError(f"{source} does not say which layers are adapted: target_modules is missing or null")
    _refuse_lost_start(values.get("init_lora_weights"), source)
    kept = {key: value for key, value in values.items() if key in ours and not (value is None and key != "r")}
    names = [name for name, _ in canonical_modules(root)]
    for key in ("target_modules", "modules_to_save"):
        if isinstance(kept.get(key), list):
            kept[key] = _those_found(kept[key], names, f"{source}: {key}")
    if kept.get("modules_to_save"):
        kept["modules_to_save"] = _unmistakable(kept["modules_to_save"], names, as_peft=True)
    if not kept.get("modules_to_save"):
        kept.pop("modules_to_save", None)
    try:
        return LoraConfig.from_dict(kept)
    except LoraConfigError as error:
        raise AdapterError(f"{source}: {error}") from error


def _refuse_lost_start(how: Any, source: str) -> None:
    """An adapter over weights that a start has changed, of which the file does not say how."""
    if how in ("corda", "lora_ga") or PISSA_NITER.fullmatch(str(how)):
        raise AdapterError(
            f"{source} has init_lora_weights={how!r}: the adapter is for a base that this start has changed, by data "
            "or draws that are not in the folder, so that it fits no base that can be had. Save it in PEFT with "
            "path_initial_model_for_weight_conversion, or load it over the changed base with init_lora_weights true"
        )


def _those_found(entries: list[str], names: list[str], what: str) -> list[str]:
    found = [entry for entry in entries if any(name and matches([entry], name) for name in names)]
    if found and len(found) < len(entries):
        _LOG.info("%s: not in this model, passed over: %s", what, ", ".join(sorted(set(entries) - set(found))))
    return found or entries


def _unmistakable(entries: list[str], names: list[str], *, as_peft: bool = False) -> list[str]:
    """Entries of ``modules_to_save`` that PEFT and we read alike, by whole names where a short one would not do.

    PEFT asks only whether a name ends in an entry, so that its ``head`` is also ``lm_head`` and its ``norm`` every
    ``layernorm``. ``as_peft`` keeps that meaning (of a file that PEFT wrote), else ours is kept.
    """
    clear: list[str] = []
    for entry in entries:
        ours = [name for name in names if matches([entry], name)]
        theirs = [name for name in names if name.endswith(entry)]
        clear += [entry] if ours == theirs else theirs if as_peft else ours
    return clear


def _skipped_some(root: nn.Module, config: LoraConfig) -> bool:
    """Whether PEFT's reading of ``target_modules`` would find more layers than were adapted."""
    adapted = {name for name, _ in lora_layers(root)}
    parents = {name for name, module in canonical_modules(root) if isinstance(module, nn.MultiheadAttention)}
    return any(
        name.rpartition(".")[0] in parents and matches(config.target_modules, name)
        for name, _ in canonical_modules(root)
        if name not in adapted
    )


def int_if_whole(value: float) -> float:
    """A number as PEFT's files have it: without a point where it is whole."""
    return int(value) if float(value).is_integer() else value
