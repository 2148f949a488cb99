"""Modules that see one of their own parameters changed while they run, and at no other time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.layers.made import made_class, plain_class
from lora_lightning.layers.recomputed import Recomputed, recomputing
from lora_lightning.layers.showing import Shown, showing

_FOLLOWS = "lora_follows"


class Showing:
    """Mixin of a part of an adapter that changes what the module which holds it sees of a parameter.

    Attributes:
        lora_parameter: The parameter's name in that module.
        lora_enabled: False shows the base's.
    """

    lora_parameter: str
    lora_enabled: bool

    def lora_value(self, weight: Tensor) -> Tensor:
        """What the module is to see in place of its parameter."""
        raise NotImplementedError

    @property
    def lora_own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        raise NotImplementedError


class LoraHolder(nn.Module):
    """Mixin of a module that has parts of an adapter, which change what it sees of its own parameters in its forward.

    The values are computed at each call, so that gradient checkpointing recomputes them too, and once more in backward:
    none outlives the forward. Whoever reads a parameter from outside gets the base's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own class makes of its input, over the changed parameters."""
        if torch.compiler.is_compiling():
            return self._traced(*args, **kwargs)
        recipes: list[Recomputed] = []
        with showing(_values(self, recipes)), recomputing(recipes):
            return super().forward(*args, **kwargs)

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        """The same in a graph, which knows no locks and has a say of its own in what is kept for backward."""
        own, parts = vars(self), [part for part in parts_of(self) if part.lora_enabled]
        try:
            for part in parts:
                own[part.lora_parameter] = part.lora_value(getattr(self, part.lora_parameter))
            return super().forward(*args, **kwargs)
        finally:
            for part in parts:
                own.pop(part.lora_parameter, None)


def _values(holder: nn.Module, recipes: list[Recomputed]) -> Iterator[Shown]:
    """What a module is to see of its parameters; and how to make it again, where autograd might keep it."""
    for part in [part for part in parts_of(holder) if part.lora_enabled]:
        base = getattr(holder, part.lora_parameter)
        value = part.lora_value(base)
        if value.requires_grad:
            again = functools.partial(part.lora_value, base)
            recipes.append(Recomputed(value, again, [base, *part.lora_own.values()]))
        yield holder, part.lora_parameter, value


def parts_of(holder: nn.Module) -> Iterator[Showing]:
    """The parts of an adapter that a module has, or follows."""
    for part in holder._modules.values():
        if isinstance(part, Showing):
            yield part
    followed: Showing | None = vars(holder).get(_FOLLOWS)
    if followed is not None:
        yield followed


def hold(holder: nn.Module, name: str, part: nn.Module, over: type[nn.Module] = LoraHolder) -> None:
    """Give a module a part of an adapter as its child, and the class that uses it."""
    holder.add_module(name, part)
    _become(holder, over)


def follow(holder: nn.Module, part: nn.Module, over: type[nn.Module] = LoraHolder) -> None:
    """Let a module see what a part of an adapter that another one has makes of a parameter that they share."""
    vars(holder)[_FOLLOWS] = part
    _become(holder, over)


def let_go(holder: nn.Module, part: nn.Module) -> None:
    """Take a part off a module; with the last of them goes the class.

    Raises:
        TypeError: If something else changed the class meanwhile.
    """
    plain = plain_class(holder)
    if plain is None:
        raise TypeError(f"the class of a {type(holder).__name__} was changed since it was adapted")
    if vars(holder).get(_FOLLOWS) is part:
        del vars(holder)[_FOLLOWS]
    for name in [name for name, child in holder._modules.items() if child is part]:
        del holder._modules[name]
    if next(parts_of(holder), None) is None:
        holder.__class__ = plain  # type: ignore[assignment]


def _become(holder: nn.Module, over: type[nn.Module]) -> None:
    if not isinstance(holder, over):
        holder.__class__ = made_class(over, type(holder))  # type: ignore[assignment]
