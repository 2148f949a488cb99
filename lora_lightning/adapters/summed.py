"""Adapters of one model made into one: checked, layer by layer combined, with a config that says what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lightning.adapters.combine import Combination, Part, combined
from lora_lightning.adapters.held import Held, explicit
from lora_lightning.adapters.swap import groups_in
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import Injected
from lora_lightning.layers import kind_of

_BIAS = "lora_B_bias"
_OF_SUMS = ("linear", "cat", "svd")  # what gives a sum, so that biases can be summed beside it


def summed(parts: Mapping[str, Held], model: nn.Module) -> Held:
    """The adapter that adds what all of them add, of the summed rank.

    Raises:
        AdapterError: If one is no update to be added (DoRA), or two train the same in full.
    """
    together = weighted(parts, dict.fromkeys(parts, 1.0), Combination("cat"), model)
    return replace(together, record=replace(together.record, config=replace(together.config, lora_dropout=0.0)))


@torch.no_grad()
def weighted(parts: Mapping[str, Held], weights: Mapping[str, float], way: Combination, model: nn.Module) -> Held:
    """The adapter that a combination makes of several; on each layer of those that have it.

    Args:
        parts: Adapters by name, in no model.
        weights: How much each counts.
        way: How.
        model: Their model; a layer is computed where it has its weight.

    Raises:
        AdapterError: If one is no update to be combined (DoRA, parameters), or two train the same in full.
        LoraConfigError: If their ranks do not go together.
    """
    if not parts:
        raise AdapterError("nothing to combine: name at least one adapter")
    if odd := [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_number(weight)]:
        raise LoraConfigError(f"weights are finite numbers, got {', '.join(odd)}")
    for name, held in parts.items():
        if why := _why_not(held, way):
            raise AdapterError(f"{name} cannot be combined with others: {why}")
    full = _in_full(parts)
    groups = groups_in(model)
    by_layer = {name: held.by_layer() for name, held in parts.items()}
    whole = way.rank([r for held in parts.values() for r, _ in held.layers.values()]) if way.of_updates else None
    with_bias = any(_BIAS in part for layers_of in by_layer.values() for part in layers_of.values())
    low: dict[str, nn.Parameter] = {}
    layers: dict[str, tuple[int, float]] = {}
    for layer, module in canonical_modules(model):
        names = [name for name, held in parts.items() if layer in held.layers]
        if not names:
            continue
        if with_bias and kind_of(module, "lora_bias") is None:
            raise AdapterError(f"{layer} is a {type(module).__name__}, whose B cannot have the bias that another has")
        device = next(iter(module.parameters(recurse=False)), torch.empty(0)).device
        own = {name: {k: p.detach().to(device) for k, p in by_layer[name][layer].items()} for name in names}
        given = [
            Part(own[name]["lora_A"], own[name]["lora_B"], parts[name].layers[layer][1], float(weights[name]))
            for name in names
        ]
        try:
            rank = whole or way.rank([len(part.a) for part in given])
            kind = getattr(kind_of(module), "lora_kind", None)
            in_first = kind in ("Conv1D", "Embedding")
            a, b = combined(given, way, rank, groups=groups.get(layer, 1), in_first=in_first)
        except LoraConfigError as error:
            raise LoraConfigError(f"{layer}: {error}") from error
        made = {"lora_A": a, "lora_B": b}
        if with_bias:
            made[_BIAS] = _bias(given, [own[name].get(_BIAS) for name in names], b)
        low |= {f"{layer}.{part}": nn.Parameter(value.cpu(), requires_grad=False) for part, value in made.items()}
        layers[layer] = (rank, 1.0)
    if inside := [layer for layer in layers if f"{layer}.weight" in full]:
        raise AdapterError(f"{inside[0]} is adapted by one of {', '.join(parts)} and trained in full by another")
    first = next(iter(parts.values()))
    return Held(
        record=_record(parts, {first.below_root(name): each for name, each in layers.items()}, model),
        prefix=first.prefix,
        layers=layers,
        low=low,
        full={name: value.clone() for name, value in full.items()},
        keys={name: key for held in parts.values() for name, key in held.keys.items()},
        base=next((held.base for held in parts.values() if held.full), first.base),
    )


def _why_not(held: Held, way: Combination) -> str | None:
    config = held.config
    if config.use_dora:
        return "DoRA scales the weights as well, and a sum of such layers is not one of them. Merge them one by one"
    if more := held.more_than_layers():
        return f"it is more than updates of layers: {more}"
    parts = {name.rpartition(".")[2] for name in held.low}
    if other := parts - {"lora_A", "lora_B", _BIAS}:
        return f"it has {', '.join(sorted(other))} beside A and B"
    if _BIAS in parts and way.how not in _OF_SUMS:
        return f"how={way.how!r} says nothing of the bias of B (lora_bias): use {', '.join(_OF_SUMS)}"
    return None


def _is_number(weight: object) -> bool:
    return isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)


def _in_full(parts: Mapping[str, Held]) -> dict[str, Tensor]:
    """What is trained in full by one of the adapters; that goes along as it is."""
    found: dict[str, Tensor] = {}
    for name, held in parts.items():
        if twice := sorted(found.keys() & held.full.keys()):
            others = [other for other, each in parts.items() if twice[0] in each.full and other != name]
            raise AdapterError(
                f"{name} and {others[0]} both have values of their own for {', '.join(twice[:4])} (modules_to_save, "
                "bias, running statistics), which cannot be summed"
            )
        found |= held.full
    return found


def _bias(given: list[Part], biases: list[Tensor | None], like: Tensor) -> Tensor:
    """``Σ w s b``, ``(out,)``: zero on a layer where no adapter has one."""
    terms = [part.weight * part.scaling * b for part, b in zip(given, biases, strict=True) if b is not None]
    return torch.stack(terms).sum(0) if terms else like.new_zeros(len(like))


def _record(parts: Mapping[str, Held], layers: Mapping[str, tuple[int, float]], model: nn.Module) -> Injected:
    """What injection would note of the result: the settings of the adapter that trains more than layers, or the first.

    Raises:
        AdapterError: If several train biases, each others'.
    """
    held = list(parts.values())
    owners = [each for each in held if each.full] or held[:1]
    if len({each.config.bias for each in owners}) > 1:
        raise AdapterError("these adapters train other biases each, which one adapter cannot say: bias must be alike")
    saved = [entry for each in owners for entry in each.config.modules_to_save or []]
    with_bias = any(each.config.lora_bias for each in held)
    config = replace(owners[0].config, modules_to_save=list(dict.fromkeys(saved)) or None, lora_bias=with_bias)
    task = next((each.config.task_type for each in owners if each.config.task_type), config.task_type)
    root = dict(canonical_modules(model))[held[0].prefix]
    return Injected(explicit(replace(config, task_type=task), layers, root), seed=0, bases=owners[0].record.bases)
