"""Adapted ``nn.Linear``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.functional import lora_linear, low_rank


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
    """``nn.Linear`` with a low-rank update, ``y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ``."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as nn.Linear's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return nn.Linear.forward(self, x)
        dropout = self._active_dropout
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_scaling, dropout)
