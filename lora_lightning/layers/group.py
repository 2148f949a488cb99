"""Adapted linear layers that one parent calls on the same input (query, key, value; gate, up), computed at once."""

from __future__ import annotations

from collections.abc import Sequence
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
        self.members = tuple(members)
        self._waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """The output of one member for ``x``: ``(..., in) -> (..., out)``."""
        if self._waiting is not None:
            known, version, outputs = self._waiting
            if known is x and version == _version(x) and id(layer) in outputs:
                out = outputs.pop(id(layer))
                if not outputs:
                    self._waiting = None
                return out
        if layer is not self.members[0] or not at_once(self.members):
            return layer.lora_together(x, [layer])[0]
        first, *others = layer.lora_together(x, self.members)
        outputs = {id(member): out for member, out in zip(self.members[1:], others, strict=True)}
        self._waiting = (x, _version(x), outputs)
        return first

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_waiting": None}


def at_once(layers: Sequence[Any]) -> bool:
    """Whether layers may be computed before (or without) being called: nothing about them would notice the difference.

    Not so where a hook may change an input, dropouts differ, one is switched off, or an engine brings the parameters
    only while a layer is being called.
    """
    if torch.compiler.is_compiling() or transformed():
        return False
    dropout, device = layers[0]._active_dropout, layers[0].weight.device
    return all(
        layer.lora_enabled
        and layer._active_dropout == dropout
        and not (layer._forward_pre_hooks or layer._backward_pre_hooks or layer._backward_hooks)
        and "forward" not in vars(layer)
        and type(layer.weight) in PLAIN
        and type(layer.lora_A) in PLAIN
        and layer.weight.device == device
        and layer.weight.shape == (layer.out_features, layer.in_features)
        and layer.weight.untyped_storage().size() > 0
        for layer in layers
    )


def dissolve(layer: nn.Module) -> None:
    """Let a layer, and the others of its group, each compute for itself again."""
    group = vars(layer).get("lora_group")
    for member in group.members if group is not None else ():
        vars(member).pop("lora_group", None)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
