"""Adapted linear layers that one parent calls on the same input (query, key, value; gate, up), computed at once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.layers.functional import PLAIN, transformed


class LoraGroup:
    """Layers whose parent calls them one after the other on one tensor.

    The first one called computes the outputs of all, with one saved input, one draw of the dropout and one product with
    their stacked ``A``; the others, called on that very tensor, hand out what is there. A layer called on anything else
    computes for itself alone.

    Args:
        members: `LoraLinear` or `DoraLinear` layers, in the order in which the parent calls them.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        # Weak: layers hold their group, and a circle would keep a model that is let go until it is collected.
        self._members = tuple(map(weakref.ref, members))
        self._waiting: tuple[Tensor, dict[int, tuple[Hashable, Tensor]]] | None = None

    @property
    def members(self) -> tuple[Any, ...]:
        """Those that are still there, in the order in which the parent calls them."""
        return tuple(member for each in self._members if (member := each()) is not None)

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """The output of one member for ``x``: ``(..., in) -> (..., out)``."""
        members = self.members
        if layer is not members[0]:
            out = self._take(layer, x)
            return layer.lora_together(x, [layer])[0] if out is None else out
        self._waiting = None  # what was not taken after the call before
        if len(members) == 1 or not at_once(members):
            return layer.lora_together(x, [layer])[0]
        first, *others = layer.lora_together(x, members)
        waiting = zip(members[1:], others, strict=True)
        self._waiting = (x, {id(member): (_moment(member, x), out) for member, out in waiting})
        return first

    def _take(self, layer: Any, x: Tensor) -> Tensor | None:
        known, outputs = self._waiting or (None, {})
        if known is not x or outputs.get(id(layer), (None,))[0] != _moment(layer, x):
            return None
        out = outputs.pop(id(layer))[1]
        if not outputs:
            self._waiting = None
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LoraGroup.__init__(self, state["members"])


def at_once(layers: Sequence[Any]) -> bool:
    """Whether layers may be computed before (or without) being called: nothing about them would notice the difference.

    Not so where a hook may change an input, dropouts differ, one is switched off, or an engine brings the parameters
    only while a layer is being called.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    dropout, device = layers[0]._active_dropout, layers[0].weight.device
    return all(
        layer.lora_enabled
        and layer._active_dropout == dropout
        and not (layer._forward_pre_hooks or layer._backward_pre_hooks or layer._backward_hooks)
        and "forward" not in vars(layer)
        and type(weight := layer.weight) in PLAIN
        and type(layer.lora_A) in PLAIN
        and weight.device == device
        and weight.shape == (layer.out_features, layer.in_features)
        and weight.untyped_storage().size() > 0
        for layer in layers
    )


def dissolve(layer: nn.Module) -> None:
    """Let a layer, and the others of its group, each compute for itself again."""
    group = vars(layer).get("lora_group")
    for member in group.members if group is not None else ():
        vars(member).pop("lora_group", None)


def _moment(layer: Any, x: Tensor) -> Hashable:
    """What has to be as it was, for an output computed beforehand to be that of the call."""
    tensors = (x, layer.weight, layer.lora_A, layer.lora_B)
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    return versions, layer._active_dropout, torch.is_grad_enabled(), get_ident()
