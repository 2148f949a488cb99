"""Injection: every layer that a config names gets an adapter, and the rest is frozen. All of it or none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import DATA_DRIVEN, changes_base
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.activation import activate, check_activation
from lora_lightning.injection.beside import inject_beside
from lora_lightning.injection.fast_paths import leave_fast_paths
from lora_lightning.injection.frozen import meant_to_train, warn_of_bare
from lora_lightning.injection.initialise import generator_for, initialise, prepare
from lora_lightning.injection.names import (
    canonical_modules,
    find_root,
    forget_walks,
    parameters_of,
    unwrap,
    walked_once,
)
from lora_lightning.injection.replicate import replicate_layers, taken_back_on_error
from lora_lightning.injection.report import LoraReport, LoraRow
from lora_lightning.injection.starts.hindrances import refuse_other_stack, refuse_starts
from lora_lightning.injection.state import (
    ORIGINALS,
    RECORD,
    Injected,
    adapter_tensors,
    copy_originals,
    copy_statistics,
    injected_roots,
    lora_layers,
    record_of,
    trained_in_full,
)
from lora_lightning.injection.targets import Plan, resolve
from lora_lightning.injection.together import compute_together
from lora_lightning.injection.tying import Untied, untie
from lora_lightning.layers import LoraLayer, adapt
from lora_lightning.layers.bits import keep_order
from lora_lightning.layers.tokens import TokenRows


def inject_lora(model: nn.Module, config: LoraConfig | Mapping[str, Any], *, seed: int | None = None) -> LoraReport:
    """Give a model its adapter, in place, and freeze everything else in it.

    Layers keep their identity, names, hooks and ties; each target gets ``lora_A`` ``(r, in)`` and ``lora_B``
    ``(out, r)``. Calling it again with the same config adapts what has been added to the model since and freezes anew.

    Args:
        model: A model, or a LightningModule around one; names in the config are relative to the transformers model
            inside it where there is one, else to ``model``.
        config: A :class:`LoraConfig`, or a mapping of its fields.
        seed: Seed of the first values; None takes ``PL_GLOBAL_SEED`` (set by ``seed_everything``), else 0.

    Returns:
        What was adapted and what it weighs.

    Raises:
        LoraConfigError: If a name matches nothing, a match cannot be adapted, or the model has another config already.
            The model is as it was then.
    """
    config = config if isinstance(config, LoraConfig) else LoraConfig.from_dict(config)
    with walked_once():
        if not injected_roots(model):
            refuse_other_stack(config)
        report = _inject(unwrap(model), config, default_seed() if seed is None else seed)
    if config.init_lora_weights in DATA_DRIVEN and any(
        record_of(root).awaits_data for root in injected_roots(model).values()
    ):
        warnings.warn(
            f"init_lora_weights={config.init_lora_weights!r} begins as data show: call initialise_from_data(model, "
            "batches) before training, or the adapter begins as a plain one",
            stacklevel=2,
        )
    return report


def inject_ahead(model: nn.Module, config: LoraConfig, *, seed: int | None = None) -> LoraReport:
    """As :func:`inject_lora`, for one who sees to it that data or saved values follow where the config asks so."""
    with walked_once():
        return _inject(unwrap(model), config, default_seed() if seed is None else seed)


def inject_unfilled(model: nn.Module, config: LoraConfig) -> LoraReport:
    """As :func:`inject_lora`, with adapters that have no values yet: for one who has them at hand."""
    with walked_once():
        return _inject(unwrap(model), config, seed=0, fill=False)


def _inject(model: nn.Module, config: LoraConfig, seed: int, *, fill: bool = True) -> LoraReport:
    root = _earlier_root(model, config) or find_root(model)[1]
    fresh = RECORD not in vars(root)
    config = config if fresh else record_of(root).config
    replicated = replicate_layers(root, config.layer_replication) if fresh and config.layer_replication else None
    if replicated is not None:
        forget_walks()
    with taken_back_on_error(replicated):
        plan = resolve(root, config, outside=model)
        refuse_starts(root, plan.targets, config)
        check_activation(root, config.alora_invocation_tokens)
    untied = _untie(model, root, plan) if fresh else ()
    awaits_data = config.init_lora_weights in DATA_DRIVEN
    before = [name for name, p in root.named_parameters() if p.requires_grad]
    heads, bare = meant_to_train(model, root, plan.in_full.values())
    for target in plan.targets:
        if isinstance(target.layer, LoraLayer):
            continue
        scaling = config.scaling(target.r, target.lora_alpha)
        adapt(target.layer, target.r, target.lora_alpha, scaling, config.lora_dropout, config.variant)
        layer = cast("LoraLayer", target.layer)
        prepare(layer, config)
        if fill or (changes_base(config.init_lora_weights) and not awaits_data):
            initialise(layer, config, generator_for(seed, target.name))
    inject_beside(root, plan, config, seed, fill=fill)
    for module in plan.in_full.values():
        for part in module.modules():
            own = [name for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
            if own and ORIGINALS not in vars(part):
                copy_originals(part, own)
    if config.alora_invocation_tokens:
        activate(root, config.alora_invocation_tokens)
    _mark_biases(root, config)
    leave_fast_paths(root)
    keep_order(model)
    compute_together(root)
    if fresh:
        record = Injected(
            config, seed, tuple(before), statistics=copy_statistics(root), awaits_data=fill and awaits_data
        )
        record.replicated, record.untied, record.followers = replicated, untied, plan.followers
        vars(root)[RECORD] = record
    freeze_base(model)
    warn_of_bare(bare)
    return report_of(model, heads)


def _untie(model: nn.Module, root: nn.Module, plan: Plan) -> tuple[Untied, ...]:
    modules = dict(canonical_modules(root))
    return tuple(untie(model, plan.in_full, [modules[name] for name in plan.followers]))


def default_seed() -> int:
    """``PL_GLOBAL_SEED``, which Lightning's ``seed_everything`` sets, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def check_config(model: nn.Module, config: LoraConfig) -> None:
    """Raise the :class:`LoraConfigError` that injecting a config would raise for its names, changing nothing."""
    model = unwrap(model)
    root = find_root(model)[1]
    replicated = None
    if config.layer_replication and RECORD not in vars(root):
        replicated = replicate_layers(root, config.layer_replication)
    try:
        resolve(root, config, outside=model)
    finally:
        if replicated is not None:
            replicated.show(0)


def freeze_base(model: nn.Module) -> None:
    """Let the adapter's parameters train and nothing else in the model."""
    still = {id(layer.lora_own[part]) for _, layer in lora_layers(model) for part in layer.lora_still}
    for tensor in freeze_rest(model).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(id(tensor) not in still)


def freeze_rest(model: nn.Module) -> dict[str, Tensor]:
    """Freeze all but the adapter's parameters, and leave those as they are.

    Returns:
        The adapter's parameters and buffers by canonical name.
    """
    model = unwrap(model)
    kept = adapter_tensors(model)
    own = {id(tensor) for tensor in kept.values()}
    for parameter in parameters_of(model):
        if id(parameter) not in own:
            parameter.requires_grad_(False)
            parameter.grad = None
    return kept


def report_of(model: nn.Module, heads: tuple[str, ...] = (), whole: nn.Module | None = None) -> LoraReport:
    """A report of a model's adapter as it stands; parameters are counted over ``whole``, if that is given."""
    model = unwrap(model)
    prefix = next((f"{name}." for name in injected_roots(model) if name), "")
    rows = []
    for name, layer in lora_layers(model):
        sides = layer.lora_sides(layer)
        weight = sum(p.numel() for part, p in layer.lora_own.items() if part not in layer.lora_still)
        rows.append(
            LoraRow(name.removeprefix(prefix), layer.lora_kind, sides, layer.lora_r, layer.lora_scaling, weight)
        )
    for name, module, originals in trained_in_full(model):
        own = [p for local, p in module.named_parameters(recurse=False) if local in originals]
        if own:
            kind = "tokens" if isinstance(module, TokenRows) else "in full"
            kind = "bias" if list(originals) == ["bias"] and "weight" in module._parameters else kind
            count = sum(p.numel() for p in own)
            rows.append(LoraRow(name.removeprefix(prefix), kind, tuple(own[0].shape[::-1]), 0, 0.0, count))
    sizes = [(_numel(p), p.requires_grad) for p in parameters_of(whole or model)]
    trainable = sum(size for size, trains in sizes if trains)
    return LoraReport(rows, trainable, sum(size for size, _ in sizes), heads)


def _earlier_root(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    """The root that was injected with an equal config before; another config is refused."""
    roots = injected_roots(model)
    for name, root in roots.items():
        record = record_of(root)
        if record.asked is not None and not record.asked.difference(config):
            continue  # data have changed ranks in it since
        if differing := record.config.difference(config):
            raise LoraConfigError(
                f"{name or type(model).__name__} already has another LoRA config, and a layer holds one adapter. "
                "They differ in (here: the one in place, there: the new one)"
                + "".join(f"\n  - {line}" for line in differing)
                + "\nCall unload_lora(model) or merge_lora(model) first."
            )
    return next(iter(roots.values()), None)


def _mark_biases(root: nn.Module, config: LoraConfig) -> None:
    if config.bias == "none":
        return
    for _, module in canonical_modules(root):
        wanted = config.bias == "all" or isinstance(module, LoraLayer)
        has_bias = isinstance(module._parameters.get("bias"), nn.Parameter)
        if wanted and has_bias and ORIGINALS not in vars(module):
            copy_originals(module, ["bias"])


def _numel(parameter: nn.Parameter) -> int:
    if (state := getattr(parameter, "quant_state", None)) is not None:  # two values in a byte
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves a parameter empty and keeps its size
