"""Adapted ``Conv1D`` of transformers (GPT-2's linear layer, whose weight is stored ``(in, out)``).

This module imports transformers, so it is imported only once a model with such a layer is at hand.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lightning.layers.alora import ALoraLayer
from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.bias import BiasLayer
from lora_lightning.layers.dora import DoraLayer
from lora_lightning.layers.dora_functional import Scaled, dora_linears
from lora_lightning.layers.functional import Adapted, lora_linear
from lora_lightning.layers.linear import LoraOverLinear


class LoraOverConv1D(LoraOverLinear):
    """Adapter over a subclass of ``Conv1D`` that has a forward of its own."""

    lora_kind = "Conv1D"
    lora_base_class = Conv1D

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(nx, nf)``: read from ``nf`` and the weight, which is all that older versions of the class keep."""
        conv = cast("Conv1D", layer)
        return getattr(conv, "nx", conv.weight.shape[0]), conv.nf

    def lora_weight_delta(self) -> Tensor:
        """``s · (B A)ᵀ``: ``(in, out)``."""
        return super().lora_weight_delta().t()


class LoraConv1D(LoraOverConv1D, Conv1D):
    """``Conv1D`` with a low-rank update, ``y = x W + b + s · (drop(x) Aᵀ) Bᵀ``."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as Conv1D's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return Conv1D.forward(self, x)
        dropout = self._active_dropout
        return lora_linear(x, self.weight.t(), self.bias, self.lora_A, self.lora_B, self.lora_scaling, dropout)


class DoraOverConv1D(DoraLayer, LoraOverConv1D):
    """DoRA over a subclass of ``Conv1D`` that has a forward of its own."""

    lora_in_first = True


class DoraConv1D(DoraOverConv1D, Conv1D):
    """``Conv1D`` with DoRA, ``y = m/‖W + s (B A)ᵀ‖ ⊙ (x W + s · (drop(x) Aᵀ) Bᵀ) + b``."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as Conv1D's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return Conv1D.forward(self, x)
        layer = Adapted(self.weight.t(), self.bias, self.lora_A, self.lora_B, self.lora_scaling)
        return dora_linears(x, [Scaled(layer, self.lora_magnitude, self.lora_norm())], self._active_dropout)[0]


class BiasOverConv1D(BiasLayer, LoraOverConv1D):
    """A bias on ``B``, over a subclass of ``Conv1D`` that has a forward of its own."""


class BiasConv1D(BiasOverConv1D, Conv1D):
    """``Conv1D`` with a low-rank update and a bias in it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as Conv1D's
        """``(..., in) -> (..., out)``."""
        if not self.lora_enabled:
            return Conv1D.forward(self, x)
        bias, dropout = self.lora_whole_bias(), self._active_dropout
        return lora_linear(x, self.weight.t(), bias, self.lora_A, self.lora_B, self.lora_scaling, dropout)


class ALoraOverConv1D(ALoraLayer, LoraOverConv1D):
    """Activated LoRA over a subclass of ``Conv1D`` that has a forward of its own."""


class ALoraConv1D(ALoraOverConv1D, Conv1D):
    """``Conv1D`` with an update where the adapter is in force."""


class ALoraBiasOverConv1D(ALoraLayer, BiasOverConv1D):
    """Activated LoRA with a bias on ``B``, over a subclass of ``Conv1D`` that has a forward of its own."""

    lora_starts = BiasOverConv1D.lora_starts


class ALoraBiasConv1D(ALoraBiasOverConv1D, Conv1D):
    """Activated ``Conv1D`` with a bias in its update."""


CONV1D_KINDS: dict[str, tuple[type[LoraLayer], type[LoraLayer]]] = {
    "lora": (LoraConv1D, LoraOverConv1D),
    "dora": (DoraConv1D, DoraOverConv1D),
    "lora_bias": (BiasConv1D, BiasOverConv1D),
    "alora": (ALoraConv1D, ALoraOverConv1D),
    "alora_bias": (ALoraBiasConv1D, ALoraBiasOverConv1D),
}
