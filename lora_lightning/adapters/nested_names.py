"""PEFT's names around adapted parameters.

PEFT puts a wrapper around a module for each parameter of it that is adapted, the last one outermost, so that a module's
own name goes with its last adapted parameter, and everything below it has ``base_layer`` in its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_lightning.injection.state import lora_layers
from lora_lightning.layers.parameters import LoraParameter, child_name, parameters_of_holder

_Holders = Mapping[str, list[str]]


def holders_of(root: nn.Module) -> _Holders:
    """Modules with adapted parameters by name: the names of the children that adapt them, in PEFT's order."""
    found = {
        name.rpartition(".")[0]: layer.lora_holder
        for name, layer in lora_layers(root)
        if isinstance(layer, LoraParameter)
    }
    return {name: [child_name(p.lora_parameter) for p in parameters_of_holder(held)] for name, held in found.items()}


def nested_name(name: str, holders: _Holders) -> str:
    """A name with the wrappers in it that PEFT has put around modules above it.

    >>> holders = {"experts": ["lora_up", "lora_down"]}
    >>> nested_name("experts.lora_down.lora_A.weight", holders)
    'experts.lora_A.weight'
    >>> nested_name("experts.lora_up.lora_A.weight", holders)
    'experts.base_layer.lora_A.weight'
    >>> nested_name("experts.act.bias", holders)
    'experts.base_layer.base_layer.act.bias'
    """
    for holder in sorted(holders, key=len, reverse=True):  # the innermost first
        if not name.startswith(f"{holder}."):
            continue
        children = holders[holder]
        child, _, rest = name.removeprefix(f"{holder}.").partition(".")
        around = len(children) if child not in children else len(children) - 1 - children.index(child)
        name = ".".join([holder, *["base_layer"] * around, *([child] if child not in children else []), rest])
        name = name.removesuffix(".")
    return name
