"""Layers whose class must not be changed blindly: what stands in the way, and what to do first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


def why_not(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted as it stands, with the remedy; None where nothing stands in the way.

    >>> why_not(nn.Linear(2, 2)) is None
    True
    """
    if isinstance(layer, LazyModuleMixin):
        return "it is lazy (its class changes at its first forward): run one batch through the model first"
    if hasattr(layer, "parametrizations"):
        return (
            "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
        )
    if {"weight_g", "weight_v"} <= layer._parameters.keys():
        return "its weight is recomputed by weight_norm: call torch.nn.utils.remove_weight_norm(layer) first"
    if "weight" not in layer._parameters and any(name.startswith("weight_") for name in layer._parameters):
        return (
            "its weight is recomputed before each forward (spectral_norm, pruning): make it permanent first, with "
            "torch.nn.utils.remove_spectral_norm(layer) or torch.nn.utils.prune.remove(layer, 'weight')"
        )
    if any(base.__name__ == "FSDPModule" for base in type(layer).__mro__):
        return "it is sharded already (fully_shard): inject before sharding, or adapters would differ between ranks"
    if type(layer).__module__.startswith("peft."):
        return "it is PEFT's own adapted layer: unload that adapter first (model.unload() or merge_and_unload())"
    if "forward" in vars(layer):
        return _why_not_hooked(layer)
    return None


def _why_not_hooked(layer: nn.Module) -> str | None:
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        return (
            "its forward was replaced on the instance, which would go on bypassing an adapter: "
            "inject before whatever replaced it (for transformers: load without tp_plan)"
        )
    if getattr(hook, "offload", False):
        return (
            "accelerate keeps its weight off the device (cpu or disk offload), which cannot be trained: load it whole"
        )
    return None


@contextlib.contextmanager
def detached_hook(layer: nn.Module) -> Iterator[None]:
    """Take accelerate's hook off a layer for the time of a change of class, and put it back over the new class.

    The hook keeps the bound forward of the old class, so a change below it would never be called.
    """
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(layer)
    vars(layer).pop("forward", None)  # accelerate leaves the old class's bound forward behind
    try:
        yield
    finally:
        add_hook_to_module(layer, hook)
