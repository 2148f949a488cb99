"""Which modules a config names: matching with PEFT's meanings, and help where a name matches nothing."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lora_lightning.config import ALL_LINEAR, TASK_HEADS, LoraConfig
from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.injection.attentions import attention_hindrance, meant_by, some, with_projections
from lora_lightning.injection.matching import compiled_patterns, entries_for, matches, pattern_value
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.parameters import ParameterTarget, parameters_meant
from lora_lightning.injection.tokens import TokenTarget, tokens_meant
from lora_lightning.injection.tying import tie
from lora_lightning.layers import LoraLayer, is_linear, is_quantised, kind_of, why_not
from lora_lightning.layers.parameters import LoraParameter
from lora_lightning.layers.tokens import TokenRows


@dataclass(frozen=True)
class Target:
    """One layer to adapt."""

    name: str
    layer: nn.Module
    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Plan:
    """What injection is about to do; names are below the root.

    Attributes:
        targets: Layers to adapt.
        in_full: Modules to train in full.
        parameters: Parameters to adapt that belong to no such layer.
        tokens: Layers of which some rows train.
        followers: Layers tied to an embedding that is adapted or trained in full, each with the embedding's name.
    """

    targets: list[Target]
    in_full: dict[str, nn.Module]
    parameters: list[ParameterTarget] = field(default_factory=list)
    tokens: list[TokenTarget] = field(default_factory=list)
    followers: dict[str, str] = field(default_factory=dict)


def resolve(root: nn.Module, config: LoraConfig, outside: nn.Module | None = None) -> Plan:
    """Find everything a config names below a root, or say all that was not found.

    Args:
        root: What names are relative to.
        config: The config.
        outside: The module around the root; ``modules_to_save`` that the root lacks are looked for there.

    Raises:
        LoraConfigError: A name that matches nothing, or a match that cannot be adapted.
    """
    ours = (LoraParameter, TokenRows)  # children that an earlier injection has made
    modules = {name: module for name, module in canonical_modules(root) if not isinstance(module, ours)}
    problems: list[str] = []
    in_full = _modules_in_full(modules, config, {} if outside is None else dict(canonical_modules(outside)), problems)
    taken = {id(part) for module in in_full.values() for part in module.modules()}
    meant = _meant(root, modules, config, problems)
    chosen: dict[str, nn.Module] = {}
    for name in with_projections(meant, modules, config):
        layer = modules[name]
        if id(layer) in taken:
            continue
        taken.add(id(layer))
        problems += _problem(name, meant_by(name, chosen), modules, config)
        chosen[name] = layer
    named = set(chosen)
    followers = tie(root, modules, config, chosen, in_full, problems)
    for name in chosen.keys() - named:  # an embedding in the place of the head that was named
        problems += _problem(name, name, modules, config)
    taken |= {id(modules[name]) for pair in followers.items() for name in pair}
    parameters = parameters_meant(modules, config, taken, problems)
    tokens = tokens_meant(root, modules, config, taken | {id(each.holder) for each in parameters}, problems)
    if not (chosen or parameters or tokens or problems):
        problems.append(
            f"target_modules={config.target_modules!r} leaves no layer to adapt. {_candidates(modules, is_linear)}"
        )
    if problems:
        raise LoraConfigError("The LoRA config does not fit this model:" + "".join(f"\n  - {p}" for p in problems))
    known = {meant_by(name, chosen): layer for name, layer in chosen.items()}
    _warn_unused(known | {each.meant: each.holder for each in parameters}, modules, config)
    targets = [
        Target(
            name,
            layer,
            int(pattern_value(config.rank_pattern, meant, config.r)),
            pattern_value(config.alpha_pattern, meant, config.lora_alpha),
        )
        for name, layer in chosen.items()
        for meant in [meant_by(name, chosen)]
    ]
    _warn_wide(targets)
    _warn_bare(targets, config)
    return Plan(targets, in_full, parameters, tokens, followers)


def _problem(name: str, meant: str, modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """A line on a layer that cannot be adapted."""
    r = int(pattern_value(config.rank_pattern, meant, config.r))
    reason = None if isinstance(modules[name], LoraLayer) else _hindrance(name, modules, config, r)
    return [] if reason is None else [f"{name or 'the model'} cannot be adapted: {reason}"]


def _hindrance(name: str, modules: Mapping[str, nn.Module], config: LoraConfig, r: int) -> str | None:
    """Why a layer cannot be adapted as the config says, with the remedy; None where nothing stands in the way."""
    layer = modules[name]
    kind = kind_of(layer, config.variant)
    if kind is None:
        field = config.variant if hasattr(config, config.variant) else f"use_{config.variant}"
        field = "alora_invocation_tokens" if config.alora_invocation_tokens else field
        return f"{field} does not go with a layer of class {type(layer).__name__}"
    start = config.init_lora_weights
    if kind.lora_starts is not None and start not in kind.lora_starts:
        listed = ", ".join(str(each).lower() for each in kind.lora_starts)
        return f"init_lora_weights={start!r} is not for a {type(layer).__name__}, which can begin with: {listed}"
    return (
        why_not(layer)
        or kind.lora_hindrance(layer)
        or kind.lora_rank_hindrance(layer, r)
        or attention_hindrance(name, modules, config)
    )


def _meant(root: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, problems: list[str]) -> list[str]:
    """Names that ``target_modules`` means, less ``exclude_modules`` and other layers than ``layers_to_transform``."""
    excluded = _set_of(config.exclude_modules)
    names = [name for name in modules if not (excluded and matches(excluded, name))]
    if config.target_modules == ALL_LINEAR:
        heads = _heads(root, config)
        return [name for name in names if is_linear(modules[name]) and modules[name] not in heads]
    wanted = _set_of(config.target_modules)
    hits: dict[str, list[str]] = {entry: [] for entry in _listed(config.target_modules)}
    found = []
    for name in names:
        if entries := entries_for(wanted, name):
            found.append(name)
            for entry in entries:
                hits[entry].append(name)
    for entry, of_entry in hits.items():
        if not any(kind_of(modules[name]) for name in of_entry):
            problems.append(_no_match("target_modules", entry, of_entry, modules))
    supported = [name for name in found if kind_of(modules[name])]
    problems += [
        f"{name} is a {type(modules[name]).__name__}, a kind of layer that cannot be adapted here; leave it out of "
        "target_modules (or name it in modules_to_save, to train it in full)"
        for name in found
        if kind_of(modules[name]) is None and any(True for _ in modules[name].parameters(recurse=False))
    ]
    return _of_layers(supported, config, problems)


def _listed(entries: str | list[str] | None) -> list[str]:
    return [entries] if isinstance(entries, str) else entries or []


def _set_of(entries: str | list[str] | None) -> str | set[str]:
    return entries if isinstance(entries, str) else set(entries or [])


def _of_layers(names: list[str], config: LoraConfig, problems: list[str]) -> list[str]:
    """Those names whose layer number is asked for: the number behind ``layers_pattern``, or the first in the name."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return names
    wanted = {chosen} if isinstance(chosen, int) else set(chosen)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    found = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or []] or [r".*?\.[^.]*\.(\d+)\."]
    numbers: dict[str, int] = {}
    for name in names:
        hit = next((hit for pattern in found if (hit := re.match(pattern, name))), None)
        if hit:
            numbers[name] = int(hit.group(1))
    if missing := sorted(wanted - set(numbers.values())):
        there = sorted(set(numbers.values()))
        seen = f"layers {there[0]} to {there[-1]} have targets" if there else "no target's name has a layer number"
        problems.append(f"layers_to_transform: no target in layer {', '.join(map(str, missing))}; {seen}")
    return [name for name in names if numbers.get(name) in wanted]


def output_embeddings(root: nn.Module) -> nn.Module | None:
    """The output head of a transformers model that has one (a classifier's does not count), else None."""
    get = getattr(root, "get_output_embeddings", None)
    return get() if callable(get) else None


def _heads(root: nn.Module, config: LoraConfig) -> list[nn.Module]:
    """What ``"all-linear"`` leaves out: the output embedding, or the head that the task type trains in full."""
    head = output_embeddings(root)
    if head is not None:
        return [head]
    named = (getattr(root, name, None) for name in TASK_HEADS.get(config.task_type or "", ()))
    return [part for module in named if isinstance(module, nn.Module) for part in module.modules()]


def _modules_in_full(
    modules: dict[str, nn.Module], config: LoraConfig, outside: dict[str, nn.Module], problems: list[str]
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or []:
        hits = {name: module for name, module in modules.items() if name and matches([entry], name)}
        hits = hits or {name: module for name, module in outside.items() if name and matches([entry], name)}
        if not hits:
            problems.append(_no_match("modules_to_save", entry, [], {**outside, **modules}, kinds=None))
        found.update(hits)
    for entry in TASK_HEADS.get(config.task_type or "", ()):
        found.update({name: module for name, module in modules.items() if name and matches([entry], name)})
    for name, module in found.items():
        if any(is_quantised(part) for part in module.modules()):
            problems.append(
                f"{name} cannot be trained in full: its weight is quantised. Leave it out of modules_to_save, or load "
                "the model with it unquantised (llm_int8_skip_modules of BitsAndBytesConfig)"
            )
    return found


def _no_match(
    field: str,
    entry: str,
    hits: list[str],
    modules: dict[str, nn.Module],
    kinds: Callable[[nn.Module], object] | None = kind_of,
) -> str:
    if hits:
        kind = type(modules[hits[0]]).__name__
        return f"{field}: {entry!r} matches only {some(hits)} ({kind}), no layer of a kind that can be adapted"
    leaves = sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    return f"{field}: {entry!r} matches nothing{did_you_mean(entry, leaves)}. {_candidates(modules, kinds)}"


def _candidates(modules: dict[str, nn.Module], kinds: Callable[[nn.Module], object] | None) -> str:
    if kinds is None:
        top = [name for name in modules if name and name.count(".") <= 1]
        return f"Modules at the top of this model: {', '.join(top[:12]) or 'none'}"
    counts = Counter(name.rpartition(".")[2] for name, module in modules.items() if name and kinds(module))
    listed = ", ".join(f"{name} (×{count})" for name, count in counts.most_common(12))
    return f"Layers in this model that can be adapted: {listed or 'none'}"


def _warn_unused(chosen: dict[str, nn.Module], modules: dict[str, nn.Module], config: LoraConfig) -> None:
    unused = [
        f"{field}[{key!r}]"
        for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for key, tail, pattern in compiled_patterns(tuple(patterns))
        if not any(name.endswith(tail) and pattern.match(name) for name in chosen)
    ]
    if config.exclude_modules:
        excluded = _set_of(config.exclude_modules)
        used = {entry for name in modules for entry in entries_for(excluded, name)}
        unused += [f"exclude_modules {entry!r}" for entry in _listed(config.exclude_modules) if entry not in used]
    if unused:
        warnings.warn(f"matches no layer and has no effect: {', '.join(unused)}", stacklevel=5)
    if config.fan_in_fan_out and not any(_stored_transposed(layer) for layer in chosen.values()):
        warnings.warn("fan_in_fan_out=True has no effect: no adapted layer stores its weight (in, out)", stacklevel=5)


def _stored_transposed(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.lora_kind == "Conv1D"


def _warn_wide(targets: list[Target]) -> None:
    wide = []
    for target in targets:
        kind = kind_of(target.layer)
        if kind is not None and target.r > kind.lora_largest_rank(target.layer):
            sides = kind.lora_sides(target.layer)
            wide.append(f"{target.name} ({sides[0]} to {sides[1]}, r={target.r})")
    if wide:
        warnings.warn(
            f"rank larger than the layer's smaller side, which adds parameters and no capacity: {some(wide)}",
            stacklevel=5,
        )


def _warn_bare(targets: list[Target], config: LoraConfig) -> None:
    bare = [target.name for target in targets if getattr(target.layer, "bias", None) is None]
    if config.lora_bias and bare:
        warnings.warn(
            f"lora_bias=True, and there is no bias in the base that it could be merged into: {some(bare)}",
            stacklevel=5,
        )
