"""Layers that carry an adapter, and the change from a plain layer to one and back.

One file a kind of layer. A new kind is one new file and one line in :data:`KINDS`.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

from lora_lightning.layers.base import LoraLayer, adapter_dtype
from lora_lightning.layers.embedding import LoraEmbedding, LoraOverEmbedding
from lora_lightning.layers.group import dissolve
from lora_lightning.layers.hazards import detached_hook, why_not
from lora_lightning.layers.linear import LoraLinear, LoraOverLinear
from lora_lightning.layers.made import declare, made_class, plain_class

__all__ = [
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "adapt",
    "is_linear",
    "kind_of",
    "plain_class",
    "restore",
    "why_not",
]

# (class with a forward of its own, class that adds to any forward)
KINDS: list[tuple[type[LoraLayer], type[LoraLayer]]] = [
    (LoraLinear, LoraOverLinear),
    (LoraEmbedding, LoraOverEmbedding),
]


def _kinds() -> list[tuple[type[LoraLayer], type[LoraLayer]]]:
    if "transformers.pytorch_utils" in sys.modules:  # else no layer of that class can exist
        from lora_lightning.layers.conv1d import LoraConv1D, LoraOverConv1D

        return [*KINDS, (LoraConv1D, LoraOverConv1D)]
    return KINDS


def kind_of(layer: nn.Module) -> type[LoraLayer] | None:
    """The LoRA class that fits a layer (its own, if it is adapted already), or None where there is none."""
    return type(layer) if isinstance(layer, LoraLayer) else _lora_class(type(layer))


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is of a linear kind, as ``"all-linear"`` means it."""
    kind = kind_of(layer)
    return kind is not None and issubclass(kind, LoraOverLinear)


def adapt(layer: nn.Module, r: int, lora_alpha: float, scaling: float, dropout: float) -> None:
    """Give a plain layer an adapter, in place: two uninitialised parameters and the class that uses them.

    Args:
        layer: A layer for which :func:`kind_of` knows a class and :func:`why_not` finds no hindrance.
        r: Rank.
        lora_alpha: Numerator of the scale, kept for the record.
        scaling: The scale ``s``.
        dropout: Probability of dropping an input of ``A`` in training.
    """
    kind = kind_of(layer)
    if kind is None or isinstance(layer, LoraLayer):
        raise TypeError(f"no adapter can be added to a layer of class {type(layer).__name__}")
    n_in, n_out = kind.lora_sides(layer)
    weight = cast("torch.Tensor", layer.weight)
    options: dict[str, Any] = {"dtype": adapter_dtype(weight), "device": weight.device}
    with detached_hook(layer):
        layer.register_parameter("lora_A", nn.Parameter(torch.empty(r, n_in, **options)))
        layer.register_parameter("lora_B", nn.Parameter(torch.empty(n_out, r, **options)))
        layer.__dict__.update(
            lora_r=r, lora_alpha=lora_alpha, lora_scaling=scaling, lora_dropout=dropout, lora_enabled=True
        )
        layer.__class__ = kind  # type: ignore[assignment]  # a subclass of what it was


def restore(layer: nn.Module) -> None:
    """Take the adapter off again: the class that the layer had, and nothing of ours left on it.

    Raises:
        TypeError: If something else changed the class meanwhile (``fully_shard`` does), which would be lost.
    """
    plain = plain_class(layer)
    if plain is None:
        raise TypeError(
            f"the layer's class is {type(layer).__name__}, which is not one that injection gave it (fully_shard "
            "changes classes too): take off what changed it first, or load the saved adapter into a fresh model"
        )
    dissolve(layer)
    with detached_hook(layer):
        layer.__class__ = plain
        del layer.lora_A, layer.lora_B
        for name in ("lora_r", "lora_alpha", "lora_scaling", "lora_dropout", "lora_enabled"):
            del layer.__dict__[name]


_LORA_OF: dict[type, type[LoraLayer] | None] = {}


def _lora_class(plain: type[nn.Module]) -> type[LoraLayer] | None:
    """The LoRA class over a plain one: ours where we know it, else one made once, which pickles by its base."""
    if plain not in _LORA_OF:
        _LORA_OF[plain] = _find_or_make(plain)
    return _LORA_OF[plain]


def _find_or_make(plain: type[nn.Module]) -> type[LoraLayer] | None:
    for own, over in _kinds():
        base = own.lora_base_class
        if plain is base:
            return cast("type[LoraLayer]", declare(own, plain))
        if issubclass(plain, base):
            return cast("type[LoraLayer]", made_class(own if plain.forward is base.forward else over, plain))
    return None
