"""A bias on ``B`` that trains: ``y = W x + b + s · (B A x + b_B)``.

For adapters that were cut out of a model trained in full, whose biases had moved too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.conv import LoraConv, LoraOverConv
from lora_lightning.layers.functional import lora_linear
from lora_lightning.layers.linear import LoraOverLinear
from lora_lightning.layers.showing import Shown


class BiasLayer(LoraLayer):
    """What layers of this variant have in common; over any forward, the bias is part of the update.

    Attributes:
        lora_B_bias: ``b_B``, ``(out,)``.
    """

    lora_B_bias: nn.Parameter
    lora_parameter_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_B_bias")
    lora_starts: ClassVar[tuple[bool | str, ...]] = (True, False)
    lora_folds = ("weight", "bias")
    bias: Any

    @classmethod
    def lora_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """``A``, ``B`` and its bias."""
        return {**super().lora_shapes(layer, r), "lora_B_bias": (cls.lora_sides(layer)[1],)}

    def lora_derived(self) -> dict[str, Tensor]:
        """The bias starts as zero."""
        return {"lora_B_bias": torch.zeros(self.lora_B_bias.shape)}

    def lora_delta(self, x: Tensor) -> Tensor:
        """``s · (B A x + b_B)``."""
        delta = super().lora_delta(x)
        return delta + self.lora_along(self.lora_scaling * self.lora_B_bias).to(delta.dtype)

    def lora_whole_bias(self) -> Tensor:
        """``b + s · b_B``, ``(out,)``, in the weight's dtype."""
        update = self.lora_scaling * self.lora_B_bias
        return (update if self.bias is None else self.bias + update).to(self.weight.dtype)

    def lora_shown(self) -> dict[str, Tensor]:
        """The weight and the bias."""
        return {**super().lora_shown(), "bias": self.lora_whole_bias()}

    def lora_delta_of(self, name: str) -> Tensor:
        """``s · b_B`` for the bias."""
        return self.lora_scaling * self.lora_B_bias if name == "bias" else super().lora_delta_of(name)

    def lora_unmergeable(self) -> str | None:
        """A bias has to have something to be added to."""
        if self.bias is not None:
            return super().lora_unmergeable()
        return "has no bias that its adapter's (lora_bias=True) could be added to: keep it as an adapter"


class BiasOverLinear(BiasLayer, LoraOverLinear):
    """Over a subclass of ``nn.Linear`` that has a forward of its own."""


class BiasLinear(BiasOverLinear, nn.Linear):
    """``nn.Linear`` with a low-rank update and a bias in it."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # as nn.Linear's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return nn.Linear.forward(self, input)
        bias, dropout = self.lora_whole_bias(), self._active_dropout
        return lora_linear(input, self.weight, bias, self.lora_A, self.lora_B, self.lora_scaling, dropout)


class BiasOverConv(BiasLayer, LoraOverConv):
    """Over a convolution that has a forward of its own."""

    def _shown(self, *, updated: bool) -> Iterator[Shown]:
        yield from super()._shown(updated=updated)
        yield self, "bias", self.lora_whole_bias()


class BiasConv(BiasOverConv, LoraConv):
    """A convolution with a low-rank update and a bias in it."""

    forward = LoraConv.forward
