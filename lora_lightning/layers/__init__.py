"""Layers that carry an adapter, and the change from a plain layer to one and back.

One file a kind of layer. A new kind, or a new variant of the forward, is one new file and a line in :data:`KINDS` for
each kind of layer that has it.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

from lora_lightning.layers.alora import ALoraBiasLinear, ALoraBiasOverLinear, ALoraLinear, ALoraOverLinear
from lora_lightning.layers.attention import LoraMultiheadAttention, LoraOverAttention
from lora_lightning.layers.base import LoraLayer, adapter_dtype
from lora_lightning.layers.bias import BiasConv, BiasLinear, BiasOverConv, BiasOverLinear
from lora_lightning.layers.bits import is_quantised
from lora_lightning.layers.conv import LoraConv, LoraOverConv
from lora_lightning.layers.dora import DoraEmbedding, DoraLayer, DoraLinear, DoraOverEmbedding, DoraOverLinear
from lora_lightning.layers.dora_conv import DoraConv, DoraOverConv
from lora_lightning.layers.embedding import LoraEmbedding, LoraOverEmbedding
from lora_lightning.layers.group import dissolve
from lora_lightning.layers.hazards import detached_hook, why_not
from lora_lightning.layers.linear import LoraLinear, LoraOverLinear
from lora_lightning.layers.made import declare, made_class, plain_class
from lora_lightning.layers.parameters import LoraParameter, restore_parameter
from lora_lightning.layers.quantised import QUANTISED_KINDS

__all__ = [
    "DoraEmbedding",
    "DoraLayer",
    "DoraLinear",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "adapt",
    "is_linear",
    "is_quantised",
    "kind_of",
    "plain_class",
    "restore",
    "why_not",
]

_Kinds = list[tuple[type[LoraLayer], type[LoraLayer]]]
# For each variant: (class with a forward of its own, class that adds to any forward)
KINDS: dict[str, _Kinds] = {
    "lora": [
        (LoraLinear, LoraOverLinear),
        (LoraEmbedding, LoraOverEmbedding),
        (LoraConv, LoraOverConv),
        (LoraMultiheadAttention, LoraOverAttention),
    ],
    "dora": [(DoraLinear, DoraOverLinear), (DoraEmbedding, DoraOverEmbedding), (DoraConv, DoraOverConv)],
    "lora_bias": [(BiasLinear, BiasOverLinear), (BiasConv, BiasOverConv)],
    "alora": [(ALoraLinear, ALoraOverLinear)],
    "alora_bias": [(ALoraBiasLinear, ALoraBiasOverLinear)],
}


def _kinds(variant: str) -> _Kinds:
    if "transformers.pytorch_utils" in sys.modules:  # else no layer of that class can exist
        from lora_lightning.layers.conv1d import CONV1D_KINDS

        return [*KINDS[variant], CONV1D_KINDS[variant]]
    return KINDS[variant]


def kind_of(layer: nn.Module, variant: str = "lora") -> type[LoraLayer] | None:
    """The adapted class that fits a layer (its own, if it is adapted already), or None where there is none."""
    if isinstance(layer, LoraLayer):
        return type(layer)
    if is_quantised(layer) and variant in QUANTISED_KINDS:
        return cast("type[LoraLayer]", made_class(QUANTISED_KINDS[variant], type(layer)))
    return _lora_class(type(layer), variant)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is of a linear kind, as ``"all-linear"`` means it."""
    kind = kind_of(layer)
    return kind is not None and issubclass(kind, LoraOverLinear)


def adapt(layer: nn.Module, r: int, lora_alpha: float, scaling: float, dropout: float, variant: str = "lora") -> None:
    """Give a plain layer an adapter, in place: its parameters, uninitialised, and the class that uses them.

    Args:
        layer: A layer for which :func:`kind_of` knows a class and :func:`why_not` finds no hindrance.
        r: Rank.
        lora_alpha: Numerator of the scale, kept for the record.
        scaling: The scale ``s``.
        dropout: Probability of dropping an input of ``A`` in training.
        variant: Which of :data:`KINDS`.
    """
    kind = kind_of(layer, variant)
    if kind is None or isinstance(layer, LoraLayer):
        raise TypeError(f"no adapter can be added to a layer of class {type(layer).__name__}")
    weight = kind.lora_weight_of(layer)
    options: dict[str, Any] = {"dtype": adapter_dtype(weight), "device": weight.device}
    with detached_hook(layer):
        for name, shape in kind.lora_shapes(layer, r).items():
            layer.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        layer.__dict__.update(
            lora_r=r, lora_alpha=lora_alpha, lora_scaling=scaling, lora_dropout=dropout, lora_enabled=True
        )
        layer.__class__ = kind  # type: ignore[assignment]  # a subclass of what it was


def restore(layer: nn.Module) -> None:
    """Take the adapter off again: the class that the layer had, and nothing of ours left on it.

    Raises:
        TypeError: If something else changed the class meanwhile (``fully_shard`` does), which would be lost.
    """
    if isinstance(layer, LoraParameter):
        return restore_parameter(layer)
    plain = plain_class(layer)
    if plain is None:
        raise TypeError(
            f"the layer's class is {type(layer).__name__}, which is not one that injection gave it (fully_shard "
            "changes classes too): take off what changed it first, or load the saved adapter into a fresh model"
        )
    dissolve(layer)
    own = cast("LoraLayer", layer).lora_parameter_names
    with detached_hook(layer):
        layer.__class__ = plain
        for name in own:
            delattr(layer, name)
        for name in ("lora_r", "lora_alpha", "lora_scaling", "lora_dropout", "lora_enabled"):
            del layer.__dict__[name]
        for name in ("lora_source", "lora_source_name"):  # of a head that is tied to an adapted embedding
            layer.__dict__.pop(name, None)
    return None


_LORA_OF: dict[tuple[type, str], type[LoraLayer] | None] = {}


def _lora_class(plain: type[nn.Module], variant: str) -> type[LoraLayer] | None:
    """The adapted class over a plain one: ours where we know it, else one made once, which pickles by its base."""
    if (plain, variant) not in _LORA_OF:
        _LORA_OF[plain, variant] = _find_or_make(plain, variant)
    return _LORA_OF[plain, variant]


def _find_or_make(plain: type[nn.Module], variant: str) -> type[LoraLayer] | None:
    for own, over in _kinds(variant):
        known = own.lora_base_class
        for base in known if isinstance(known, tuple) else (known,):
            if plain is base and issubclass(own, base):
                return cast("type[LoraLayer]", declare(own, plain))
            if issubclass(plain, base):
                same = all(getattr(plain, name) is getattr(base, name) for name in own.lora_reads)
                return cast("type[LoraLayer]", made_class(own if same else over, plain))
    return None
