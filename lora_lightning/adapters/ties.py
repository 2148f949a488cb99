"""Weights that several modules share, which merging into one of them would change for all."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import record_of
from lora_lightning.layers import DoraLayer, LoraLayer

_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Owner:
    """One module that a tensor belongs to.

    Attributes:
        name: The tensor's canonical name there.
        module: The module.
        local: The tensor's name in it.
        layer: The adapted layer whose merge changes the tensor here, if one does: the module, or one above it.
        fold: The tensor's name below that layer.
    """

    name: str
    module: nn.Module
    local: str
    layer: LoraLayer | None = None
    fold: str = ""


@dataclass
class Ties:
    """What was found, and done about it.

    Attributes:
        once: (id of a layer, name below it) of tensors that another layer's merge changes in just the same way.
        copies: Tensors that were made, with those that they are copies of.
        names: Names of the weights that got a tensor of their own.
    """

    once: set[tuple[int, str]] = field(default_factory=set)
    copies: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)
    names: tuple[str, ...] = ()


def part_ties(
    model: nn.Module, root: nn.Module, layers: Mapping[str, LoraLayer], undo: ExitStack, *, untie: bool
) -> Ties:
    """See to it that merging into each layer changes nothing else.

    Args:
        model: The injected model.
        root: Its injected root, whose ``config`` may say that embeddings are tied.
        layers: Its adapted layers by name.
        undo: Gets what puts everything back.
        untie: Give adapted layers a weight of their own where they share one; else that is refused.

    Raises:
        AdapterError: If weights are tied that must not change together, and may not or cannot be untied.
    """
    ties = Ties()
    apart: list[Owner] = []
    for owners in _shared(model, layers):
        adapted = [owner for owner in owners if owner.layer is not None]
        if len(adapted) == len(owners) and _alike(adapted):
            ties.once.update((id(owner.layer), owner.fold) for owner in adapted[1:])
            continue
        if record_of(root).replicated is not None:
            raise AdapterError(
                f"not merged: layer_replication has made {' and '.join(owner.name for owner in owners)} one weight, "
                "and each layer has an adapter of its own. Keep the adapter beside the model (save_adapter), or build "
                "and save a model whose layers have weights of their own, before anything is injected"
            )
        if not untie:
            others = [owner.name.rpartition(".")[0] for owner in owners if owner is not adapted[0]]
            raise AdapterError(
                f"not merged: the weight of {adapted[0].name.rpartition('.')[0]} is tied to {', '.join(others)}, which "
                f"would change with it. merge_lora(model, untie=True) (lora-lightning merge --untie) gives each a copy "
                f"of its own, {getattr(adapted[0].module, adapted[0].local).numel():,} parameters more"
            )
        apart += adapted[len(adapted) == len(owners) :]  # of tensors that are all adapted, one keeps the first
    if record_of(root).untied and _ends_apart(root):  # modules trained in full
        _check_flag(root)
        _clear_flag(root, undo)
    if apart:
        _check_flag(root)
        ties.copies = [_part(owner, undo) for owner in apart]
        ties.names = tuple(owner.name for owner in apart)
        _clear_flag(root, undo)
        more = sum(copy.numel() for copy, _ in ties.copies)
        warnings.warn(
            f"untied before merging: {', '.join(ties.names)}; the model has {more:,} parameters more, and where its "
            f"config said {_FLAG} it does no longer",
            stacklevel=4,
        )
    return ties


def _ends_apart(root: nn.Module) -> bool:
    """Whether a transformers model has an input embedding and a head with weights of their own."""
    ends = [getattr(root, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    return None not in weights and weights[0] is not weights[1]


def _shared(model: nn.Module, layers: Mapping[str, LoraLayer]) -> Iterator[list[Owner]]:
    """The owners of each tensor that merging changes and several modules have."""
    folds: dict[tuple[int, str], tuple[LoraLayer, str]] = {}
    for layer in layers.values():
        for fold in layer.lora_folds:
            module, local = layer.lora_place(fold)
            folds[id(module), local] = (layer, fold)
    found: dict[int, list[Owner]] = {}
    for prefix, module in canonical_modules(model):
        for local, tensor in module._parameters.items():
            if tensor is not None:
                name = f"{prefix}.{local}" if prefix else local
                owner = Owner(name, module, local, *folds.get((id(module), local), ()))
                found.setdefault(id(tensor), []).append(owner)
    for owners in found.values():
        if len(owners) > 1 and any(owner.layer is not None for owner in owners):
            yield owners


def _alike(owners: list[Owner]) -> bool:
    """Whether adapters that share a weight would change it in the same way, as tied adapters do.

    DoRA's magnitudes are of one layer's outputs, beside any update.
    """
    if any(isinstance(owner.layer, DoraLayer) for owner in owners):
        return False
    first, *others = (_delta(owner) for owner in owners)
    size = torch.linalg.vector_norm(first)
    return all(other.shape == first.shape and bool((other - first).norm() <= 1e-6 * size) for other in others)


def _delta(owner: Owner) -> Tensor:
    assert owner.layer is not None
    return owner.layer.lora_delta_of(owner.fold)


def _part(owner: Owner, undo: ExitStack) -> tuple[nn.Parameter, nn.Parameter]:
    shared: Any = owner.module._parameters[owner.local]
    own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    undo.callback(owner.module._parameters.__setitem__, owner.local, shared)
    owner.module._parameters[owner.local] = own
    return own, shared


def _configs(root: nn.Module) -> list[Any]:
    config = getattr(root, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return [each for each in {id(c): c for c in (config, text)}.values() if getattr(each, _FLAG, False)]


def _check_flag(root: nn.Module) -> None:
    """Refuse a model that computes in another way once its config says that nothing is tied."""
    code = getattr(inspect.unwrap(type(root).forward), "__code__", None)
    if code is not None and _FLAG in code.co_names and _configs(root):
        raise AdapterError(
            f"not merged: {type(root).__name__} scales its outputs by whether {_FLAG} is set, so that its weights "
            "cannot be untied; leave embeddings and head out of target_modules, or keep the adapter beside the model"
        )


def _clear_flag(root: nn.Module, undo: ExitStack) -> None:
    """Tell transformers, which would tie the weights again when the model is loaded."""
    for config in _configs(root):
        undo.callback(setattr, config, _FLAG, True)
        setattr(config, _FLAG, False)
    known = vars(root).get("all_tied_weights_keys")
    if known:
        undo.callback(vars(root).__setitem__, "all_tied_weights_keys", known)
        still = {a: b for a, b in known.items() if root.get_parameter(a) is root.get_parameter(b)}
        vars(root)["all_tied_weights_keys"] = still
