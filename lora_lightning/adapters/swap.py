"""Another adapter's values in the tensors that one has: the layers, their shapes and their scales stay what they were.

So nothing that was compiled for the one is compiled anew for the other. A smaller rank is filled up with zeros. No
scale is a tensor for it: what an adapter's scale differs from the layer's goes into its ``B``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_lightning.adapters.facts import OUTSIDE_FILE
from lora_lightning.adapters.folder import (
    BASE_COPY,
    STATISTICS,
    read_config,
    read_record,
    read_weights,
    warn_of_other_base,
)
from lora_lightning.adapters.held import Held, explicit
from lora_lightning.adapters.hub import adapter_folder
from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.adapters.peft_notes import without_unused
from lora_lightning.adapters.tensor_file import read_tensors
from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import changes_base
from lora_lightning.errors import AdapterError
from lora_lightning.injection.attentions import meant_by
from lora_lightning.injection.matching import pattern_value
from lora_lightning.injection.names import canonical_modules

_RANK_AT = {"lora_A": 0, "lora_B": 1}  # the dimension that is the rank
_SCALED = ("lora_B", "lora_B_bias")


@torch.no_grad()
def refill(
    held: Held, model: nn.Module, folder: str | os.PathLike[str], live: Mapping[str, Tensor] | None = None
) -> None:
    """Give an adapter's tensors the values of an adapter folder, all of them or none.

    Args:
        held: The adapter.
        model: The model that it is for.
        folder: An adapter folder, ours or PEFT's, of the same or smaller ranks and on the same layers or fewer: on a
            layer that it has not, the adapter does nothing afterwards.
        live: Where the adapter is in the model: the tensors there of what trains in full, by name.

    Raises:
        AdapterError: If it does not fit.
    """
    _refuse_more(held)
    path = adapter_folder(folder)
    config = read_config(model, path)
    if problems := _other_kind(held.config, config):
        raise AdapterError(f"{path} cannot be swapped in:" + "".join(f"\n  - {line}" for line in problems))
    ours = {key: name for name, key in held.keys.items()}
    modules, record = dict(canonical_modules(model)), read_record(path)
    copies = {f"{PREFIX}{held.below_root(name)}{BASE_COPY}" for name in held.layers}
    attentions = [held.below_root(n) for n in held.layers if isinstance(modules[n], nn.MultiheadAttention)]
    weights = without_unused(read_weights(path), attentions, str(path))
    weights = {key: value for key, value in weights.items() if key not in copies}
    if unknown := sorted(weights.keys() - ours.keys()):
        raise AdapterError(
            f"{path} has what the adapter in place has not: {', '.join(unknown[:4])}. Swapping keeps the layers: load "
            "it under a name of its own"
        )
    given = {ours[key]: value for key, value in weights.items()}
    if (outside := path / OUTSIDE_FILE).is_file():
        given |= read_tensors(outside)
    tensors = {**(held.full if live is None else live), **held.low}
    values = _low_rank(held, config, given, model, path) | _in_full(held, given, path)
    warn_of_other_base(record, held.base, str(path))  # a warning may be made an error: before any change
    for name, value in values.items():
        tensors[name].copy_(value)
    held.record.bases, held.record.source = tuple(record.get("bases", ())), str(path.resolve())
    held.record.awaits_data = False


@torch.no_grad()
def make_room(held: Held, model: nn.Module, r: int) -> None:
    """Fill an adapter that is in no model up with zeros to a rank, so that others of that rank fit in; its config too.

    Args:
        held: The adapter.
        model: The model that it is for.
        r: The rank; layers of a larger one keep theirs.

    Raises:
        AdapterError: If its ranks are not those of a product of two matrices.
    """
    _refuse_more(held)
    root, groups = dict(canonical_modules(model))[held.prefix], groups_in(model)
    wanted = {held.below_root(name): (max(r, rank), scaling) for name, (rank, scaling) in held.layers.items()}
    config = explicit(held.config, wanted, root)
    told = _told(config, held, model)
    for layer, parts in held.by_layer().items():
        (rank, scaling), (room, now) = held.layers[layer], told[layer]
        for part, parameter in parts.items():
            parameter.data = _fitted(parameter.data, part, room - rank, groups.get(layer, 1), scaling, now)
        held.layers[layer] = (room, now)
    held.record = replace(held.record, config=config)


def groups_in(model: nn.Module) -> dict[str, int]:
    """The groups of each convolution, by name."""
    return {name: module.groups for name, module in canonical_modules(model) if isinstance(module, _ConvNd)}


def _told(config: LoraConfig, held: Held, model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale that a config has for an adapter's layers."""
    modules = dict(canonical_modules(model))
    layers = {held.below_root(name): modules[name] for name in held.layers}
    found = {}
    for name in held.layers:
        meant = meant_by(held.below_root(name), layers)
        r = int(pattern_value(config.rank_pattern, meant, config.r))
        found[name] = (r, config.scaling(r, pattern_value(config.alpha_pattern, meant, config.lora_alpha)))
    return found


def _refuse_more(held: Held) -> None:
    if more := held.more_than_layers():
        raise AdapterError(f"only updates of layers can be swapped or given room, and this adapter is more: {more}")


def _other_kind(here: LoraConfig, there: LoraConfig) -> list[str]:
    """What zeros and scales do not make alike."""
    fields = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
    both = [(name, getattr(here, name), getattr(there, name)) for name in fields]
    problems = [f"{name}: {a!r} in place, {b!r} in the folder" for name, a, b in both if a != b and (a or b)]
    if changes_base(start := there.init_lora_weights):
        saved = ", or load it, save it and swap what was saved, which is for the base as it is"
        problems.append(
            f"init_lora_weights={start!r}: its values are for a base that this start has changed. Load it under a name "
            f"of its own{'' if start == 'loftq' else saved}"
        )
    return problems


def _low_rank(
    held: Held, config: LoraConfig, given: Mapping[str, Tensor], model: nn.Module, path: Path
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    problems = []
    told, groups = _told(config, held, model), groups_in(model)
    for layer, parts in held.by_layer().items():
        (rank, scaling), (r, theirs) = held.layers[layer], told[layer]
        there = {part: given[f"{layer}.{part}"] for part in parts if f"{layer}.{part}" in given}
        if not there and set(parts) <= {*_RANK_AT, *_SCALED}:
            values |= {f"{layer}.{part}": torch.zeros_like(parameter) for part, parameter in parts.items()}
            continue
        if missing := sorted(parts.keys() - there.keys()):
            problems.append(f"{layer} has no {', '.join(missing)} in it")
        elif r > rank:
            problems.append(f"{layer} has room for r={rank}, got r={r}")
        elif theirs and not scaling:
            problems.append(f"{layer} has the scale 0, which no B makes up for")
        else:
            for part, parameter in parts.items():
                value = there[part].to(parameter.dtype)
                value = _fitted(value, part, rank - r, groups.get(layer, 1), theirs, scaling)
                if value.shape != parameter.shape:
                    shapes = f"{tuple(there[part].shape)}, in place {tuple(parameter.shape)}"
                    problems.append(f"{layer}.{part} is {shapes}")
                values[f"{layer}.{part}"] = value
    if problems:
        more = [f"{len(problems) - 4} more layers do not fit"] if problems[4:] else []
        raise AdapterError(
            f"{path} does not fit into the adapter in place (load that one with room=… for the largest rank to come):"
            + "".join(f"\n  - {line}" for line in problems[:4] + more)
        )
    return values


def _in_full(held: Held, given: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    lacking = [name for name in held.full if name not in given and not name.endswith(STATISTICS)]
    if lacking:
        raise AdapterError(f"{path} lacks what the adapter in place trains in full: {', '.join(lacking[:4])}")
    values = {name: given[name] for name in given if name not in held.low}
    if other := [name for name in values if name not in held.full or values[name].shape != held.full[name].shape]:
        raise AdapterError(f"{path} has other shapes than the adapter in place: {', '.join(other[:4])}")
    return values


def _fitted(value: Tensor, part: str, more: int, groups: int, scaling: float, into: float) -> Tensor:
    """A parameter of a layer of scale ``scaling`` for one of scale ``into`` and of so many ranks more, all zero.

    The zeros come after the ranks that there are; after those of each group in the ``A`` of a grouped convolution.
    """
    if part in _SCALED and scaling != into:
        value = value * (scaling / into)
    if part not in _RANK_AT or not more:
        return value
    at = _RANK_AT[part]
    blocks = value.unflatten(0, (groups, -1)) if at == 0 else value[None]
    zeros = value.new_zeros(*blocks.shape[: at + 1], more // groups, *blocks.shape[at + 2 :])
    return torch.cat([blocks, zeros], dim=at + 1).flatten(0, 1)
