"""Adapted ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.functional import Adapted, lora_linears, low_rank
from lora_lightning.layers.group import LoraGroup


class LoraOverLinear(LoraLayer):
    """Adapter over a subclass of ``nn.Linear`` that has a forward of its own: the update is added to its output."""

    lora_kind = "Linear"
    lora_base_class: ClassVar[type[nn.Module]] = nn.Linear

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        linear = cast("nn.Linear", layer)
        return linear.in_features, linear.out_features

    def lora_delta(self, x: Tensor) -> Tensor:
        """``s · (drop(x) Aᵀ) Bᵀ``: ``(..., in) -> (..., out)``."""
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return low_rank(x, a, b, self.lora_scaling, self._active_dropout)

    def lora_weight_delta(self) -> Tensor:
        """``s · B A``: ``(out, in)``."""
        return self.lora_scaling * (self.lora_B @ self.lora_A)


class LoraLinear(LoraOverLinear, nn.Linear):
    """``nn.Linear`` with a low-rank update, ``y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ``.

    Attributes:
        lora_group: The layers that its parent calls on the same input, with which it shares work; often none.
    """

    lora_group: LoraGroup | None = None

    @property
    def lora_tensors(self) -> Adapted:
        """What the arithmetic needs of the layer."""
        return Adapted(self.weight, self.bias, self.lora_A, self.lora_B, self.lora_scaling)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # as nn.Linear's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return nn.Linear.forward(self, input)
        if self.lora_group is not None:
            return self.lora_group.output(self, input)
        return self.lora_together(input, [self])[0]

    @staticmethod
    def lora_together(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs of layers on one input: ``(..., in) -> (..., out)`` each."""
        return lora_linears(x, [layer.lora_tensors for layer in layers], layers[0]._active_dropout)
