"""Adapted ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

The update is two convolutions after each other: ``A`` as the layer's own with ``r`` outputs, ``B`` with a kernel of
size one. Shapes: ``k…`` the sizes of the kernel, ``g`` the groups, ``N`` the batch; ``A`` is ``(r, in, k…)`` and ``B``
``(out, r/g, 1…)``, as PEFT has them. Where the layer has groups, ``A`` sees the channels of all, and the outputs of a
group are made of that group's ``r/g`` rows of ``A``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.layers.base import LoraLayer, input_of
from lora_lightning.layers.showing import Shown, showing

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NO_PLACE = (
    "has groups={}, and its update reads the channels of all groups for every output (so does PEFT's), for which a "
    "weight in groups has no place: keep it as an adapter"
)
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraOverConv(LoraLayer):
    """Adapter over a convolution with a forward of its own, which is given the adapted weight to work with.

    So it may pad, mask or normalise as it likes: its outputs are those that it will have when the adapter is merged.
    """

    lora_kind = "Conv"
    lora_base_class: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS
    lora_starts: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian")
    lora_reads: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")
    kernel_size: tuple[int, ...]
    groups: int

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(in_channels, out_channels)``."""
        conv = cast("nn.Conv2d", layer)
        return conv.in_channels, conv.out_channels

    @classmethod
    def lora_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """``A`` with the layer's kernel, ``B`` with one of size one."""
        conv = cast("nn.Conv2d", layer)
        ones = (1,) * len(conv.kernel_size)
        a = (r, conv.in_channels, *conv.kernel_size)
        return {"lora_A": a, "lora_B": (conv.out_channels, r // conv.groups, *ones)}

    @classmethod
    def lora_largest_rank(cls, layer: nn.Module) -> int:
        """A group's update is ``(out/g, in·k…)``, and ``r/g`` rows make it."""
        conv = cast("nn.Conv2d", layer)
        return conv.groups * min(conv.out_channels // conv.groups, conv.in_channels * math.prod(conv.kernel_size))

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """A forward that is not known can only be given a weight of its own shape."""
        groups = cast("nn.Conv2d", layer).groups
        if groups == 1 or issubclass(cls, LoraConv):
            return super().lora_hindrance(layer)
        return (
            f"its class {type(layer).__name__} has a forward of its own and groups={groups}: the update of grouped "
            "convolutions reads all channels, for which its weight has no place. Leave it out, with its name in "
            "exclude_modules"
        )

    @classmethod
    def lora_rank_hindrance(cls, layer: nn.Module, r: int) -> str | None:
        """Each group has as many rows of ``A`` as any."""
        groups = cast("nn.Conv2d", layer).groups
        if r % groups == 0:
            return None
        fitting = max(1, round(r / groups)) * groups
        return (
            f"its {groups} groups share the rank, and {r} cannot be divided by {groups}: give it another (such as "
            f"{fitting}) by rank_pattern, or leave it out with exclude_modules"
        )

    def lora_along(self, values: Tensor) -> Tensor:
        """One value an output, ``(out,)``, to be put beside an output: ``(out, 1…)``."""
        return values.view(-1, *[1] * len(self.kernel_size))

    def lora_weight_delta(self) -> Tensor:
        """``s · B A``: ``(out, in, k…)``.

        Raises:
            AdapterError: If the layer has groups, in whose weight there is no place for all of it.
        """
        if self.groups > 1:
            raise AdapterError(f"a convolution {_NO_PLACE.format(self.groups)}")
        delta = self.lora_scaling * (self.lora_B.flatten(1) @ self.lora_A.flatten(1))
        return delta.view(self.lora_B.shape[0], *self.lora_A.shape[1:])

    def lora_unmergeable(self) -> str | None:
        """A weight in groups has no place for what one group's outputs get from another's channels."""
        return _NO_PLACE.format(self.groups) if self.groups > 1 else super().lora_unmergeable()

    def lora_scaled(self, weight: Tensor) -> Tensor:
        """What the layer multiplies with, of ``W + s · B A`` or of ``W``: just that, without DoRA."""
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(N, in, …) -> (N, out, …)``, by the class's own forward ``f``: ``f(x; W + s · B A)``.

        With dropout, which is on the way to ``A`` alone: ``f(x; W) + f(drop(x); W + s · B A) - f(drop(x); W)``.
        """
        own = super(LoraLayer, self).forward
        if not self.lora_enabled:
            return own(*args, **kwargs)
        if not self._active_dropout:
            with showing(self._shown(updated=True)):
                return own(*args, **kwargs)
        with showing(self._shown(updated=False)):
            out = own(*args, **kwargs)
        x = input_of(self, out, args, kwargs)
        dropped = F.dropout(x, self._active_dropout)
        args = tuple(dropped if each is x else each for each in args)
        kwargs = {name: dropped if each is x else each for name, each in kwargs.items()}
        with showing(self._shown(updated=False)):
            straight = own(*args, **kwargs)
        with showing(self._shown(updated=True)):
            return out + (own(*args, **kwargs) - straight)

    def _shown(self, *, updated: bool) -> Iterator[Shown]:
        weight = (self.weight + self.lora_weight_delta()).to(self.weight.dtype) if updated else self.weight
        yield self, "weight", self.lora_scaled(weight)


class LoraConv(LoraOverConv):
    """A convolution with a low-rank update, ``y = W * x + b + s · B * (A * drop(x))``, ``*`` being the layer's own.

    Stride, padding (with its mode) and dilation are those of ``A`` too.
    """

    bias: Tensor | None
    _conv_forward: Any

    def lora_delta(self, x: Tensor) -> Tensor:
        """``s · B * (A * drop(x))``: ``(N, in, …) -> (N, out, …)``."""
        low = self._convolve(F.dropout(x, self._active_dropout), self.lora_A.to(x.dtype))
        b = (self.lora_scaling * self.lora_B).to(x.dtype)
        return _CONVOLVE[len(self.kernel_size)](low, b, groups=self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, in, …) -> (N, out, …)``, and the same without ``N``."""
        out = self._conv_forward(input, self.weight, self.bias)
        return out + self.lora_delta(input).to(out.dtype) if self.lora_enabled else out

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the layer, over all channels at once and without a bias; ``weight`` is ``(…, in, k…)``."""
        conv = cast("nn.Conv2d", self)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0,) * len(self.kernel_size)
        convolve: Any = _CONVOLVE[len(self.kernel_size)]
        return convolve(x, weight, None, conv.stride, padding, conv.dilation)


def grouped(tensor: Tensor, groups: int) -> tuple[Tensor, ...]:
    """A weight's outputs (or ``A``'s rows) by group, each as a matrix ``(rows/g, -1)``."""
    return tuple(part.flatten(1) for part in torch.chunk(tensor, groups))
