"""DoRA of convolutions: ``W' = m/‖W + s B A‖ · (W + s B A)``, the norm over all that one output channel is made of.

Source: DoRA, arXiv 2402.09353. Shapes as in :mod:`lora_lightning.layers.conv`; ``m`` is ``(1, out, 1…)``, as PEFT's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.layers.base import COMPUTED_IN
from lora_lightning.layers.conv import LoraConv, LoraOverConv, grouped
from lora_lightning.layers.dora import DoraLayer
from lora_lightning.layers.dora_functional import ratio
from lora_lightning.layers.dora_norm import adapted_norms


class DoraOverConv(DoraLayer, LoraOverConv):
    """DoRA over a convolution with a forward of its own, which is given the adapted weight to work with."""

    @classmethod
    def lora_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """``A``, ``B`` and ``m``, which lies along the channels of an output."""
        conv = cast("nn.Conv2d", layer)
        shapes = super().lora_shapes(layer, r)
        return {**shapes, "lora_magnitude": (1, conv.out_channels, *[1] * len(conv.kernel_size))}

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """DoRA needs the norms of the weight, so all of it has to be there, as numbers."""
        conv = cast("nn.Conv2d", layer)
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if conv.weight.dtype not in COMPUTED_IN or tuple(conv.weight.shape) != shape:
            return (
                f"DoRA needs the norms of its weight, which is stored as {tuple(conv.weight.shape)} of "
                f"{conv.weight.dtype} where {shape} is meant: use_dora=False, or inject before anything splits a weight"
            )
        return super(DoraLayer, cls).lora_hindrance(layer)

    def _norm(self) -> Tensor:
        """``(1, out, 1…)``.

        Of a layer in groups, an output's weights are those of its group and, for all other channels, the update alone.
        """
        groups, s = self.groups, self.lora_scaling
        norms = []
        parts = (grouped(self.weight, groups), torch.chunk(self.lora_A, groups), grouped(self.lora_B, groups))
        for i, (weight, a, b) in enumerate(zip(*parts, strict=True)):
            channels = list(torch.chunk(a, groups, dim=1))
            norm = adapted_norms(weight, channels.pop(i).flatten(1), b, s)
            if channels:
                others = torch.cat(channels, dim=1).flatten(1)
                nothing = weight.new_zeros(1).expand(len(b), others.shape[1])
                norm = torch.hypot(norm, adapted_norms(nothing, others, b, s))
            norms.append(norm)
        return torch.cat(norms).view(self.lora_magnitude.shape)

    def lora_ratio(self) -> Tensor:
        """``m/‖W + s B A‖``, ``(out,)``."""
        return ratio(self.lora_magnitude, self.lora_norm()).flatten()

    def lora_scaled(self, weight: Tensor) -> Tensor:
        """``m/‖W + s B A‖`` times a weight, output by output."""
        return (weight * self.lora_along(self.lora_ratio())[:, None]).to(weight.dtype)

    def lora_merged(self, weight: Tensor, delta: Tensor) -> Tensor:
        """``m/‖W + s B A‖ · (W + s B A)``."""
        direction = weight + delta
        norm = torch.linalg.vector_norm(direction.detach().flatten(1), dim=1)
        return direction * self.lora_along(ratio(self.lora_magnitude.flatten().to(norm.dtype), norm))[:, None]

    forward: Any = LoraOverConv.forward


class DoraConv(DoraOverConv, LoraConv):
    """A convolution with DoRA, ``y = m/‖W + s B A‖ ⊙ (W * x + s · B * (A * drop(x))) + b``."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # as the convolutions'
        """``(N, in, …) -> (N, out, …)``, and the same without ``N``."""
        if not self.lora_enabled:
            return self._conv_forward(input, self.weight, self.bias)
        z = self._conv_forward(input, self.weight, None)
        z = z + self.lora_delta(input).to(z.dtype)
        y = (z * self.lora_along(self.lora_ratio())).to(z.dtype)
        return y if self.bias is None else y + self.lora_along(self.bias).to(y.dtype)
