"""DoRA: layers that learn the length of each output's weights apart from their direction.

``W' = m/‖W + s B A‖ · (W + s B A)``, row by row, with ``m`` a parameter ``lora_magnitude`` that starts as the norm.
Source: DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Self

from lora_lightning.layers.base import COMPUTED_IN, LoraLayer, input_of
from lora_lightning.layers.dora_functional import Scaled, dora_linears, ratio
from lora_lightning.layers.dora_norm import adapted_norms, beside, forget, remembered
from lora_lightning.layers.embedding import LoraOverEmbedding
from lora_lightning.layers.functional import Adapted
from lora_lightning.layers.group import LoraGroup
from lora_lightning.layers.linear import LoraOverLinear


class DoraLayer(LoraLayer):
    """What layers of this variant have in common; over any forward, it scales the output that has no bias in it.

    Attributes:
        lora_magnitude: ``m``, ``(out,)``.
        lora_in_first: Whether the base weight is stored ``(in, out)``.
    """

    lora_magnitude: nn.Parameter
    lora_parameter_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude")
    lora_in_first: ClassVar[bool] = False

    @classmethod
    def lora_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """``A``, ``B`` and ``m``."""
        return {**super().lora_shapes(layer, r), "lora_magnitude": (cls.lora_sides(layer)[1],)}

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """DoRA needs the norms of the weight, so all of it has to be there, as numbers."""
        weight = cast("Tensor", layer.weight)
        if hasattr(weight, "ds_id"):
            return (
                "DoRA needs the norms of its weight, which DeepSpeed has split (ZeRO-3): build the model without "
                "zero.Init, or use ZeRO-2"
            )
        if weight.dtype not in COMPUTED_IN or sorted(weight.shape) != sorted(cls.lora_sides(layer)):
            return (
                f"DoRA needs the norms of its weight, which is stored as {type(weight).__name__} of "
                f"{weight.dtype}, {tuple(weight.shape)}: use_dora=False for a quantised base, and inject before FSDP "
                "flattens a weight"
            )
        return None

    def lora_derived(self) -> dict[str, Tensor]:
        """``m`` starts as the norm, so that the layer starts as the base's does."""
        norm = self._norm()
        return {"lora_magnitude": norm.full_tensor() if isinstance(norm, DTensor) else norm}

    def lora_norm(self) -> Tensor:
        """``‖W + s B A‖`` of each output, ``(out,)``; without a gradient."""
        return remembered(self, (self.weight, self.lora_A, self.lora_B), self.lora_scaling, self._norm)

    def train(self, mode: bool = True) -> Self:
        """As any module; around a change of mode weights may be written in ways that leave no trace."""
        forget(self)
        return super().train(mode)

    def _norm(self) -> Tensor:
        return adapted_norms(self.weight, self.lora_A, self.lora_B, self.lora_scaling, in_first=self.lora_in_first)

    def lora_merged(self, weight: Tensor, delta: Tensor) -> Tensor:
        """``m/‖W + s B A‖ · (W + s B A)``."""
        direction = weight + delta
        norm = torch.linalg.vector_norm(direction.detach(), dim=0 if self.lora_in_first else 1)
        c = ratio(beside(self.lora_magnitude.to(norm.dtype), norm), norm)
        return direction * (c if self.lora_in_first else c[:, None])

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The base layer's output, whatever its class does with its input, and what DoRA changes in it."""
        out: Tensor = super(LoraLayer, self).forward(*args, **kwargs)
        if not self.lora_enabled:
            return out
        x = input_of(self, out, args, kwargs)
        bias = getattr(self, "bias", None)
        straight = out if bias is None else out - bias
        c = ratio(self.lora_magnitude, self.lora_norm())
        return out + ((c - 1) * straight + c * self.lora_delta(x)).to(out.dtype)


class DoraOverLinear(DoraLayer, LoraOverLinear):
    """DoRA over a subclass of ``nn.Linear`` that has a forward of its own."""


class DoraLinear(DoraOverLinear, nn.Linear):
    """``nn.Linear`` with DoRA, ``y = m/‖W + s B A‖ ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b``.

    Attributes:
        lora_group: The layers that its parent calls on the same input, with which it shares work; often none.
    """

    lora_group: LoraGroup | None = None

    @property
    def lora_tensors(self) -> Scaled:
        """What the arithmetic needs of the layer."""
        adapted = Adapted(self.weight, self.bias, self.lora_A, self.lora_B, self.lora_scaling)
        return Scaled(adapted, self.lora_magnitude, self.lora_norm())

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
        return dora_linears(x, [layer.lora_tensors for layer in layers], layers[0]._active_dropout)


class DoraOverEmbedding(DoraLayer, LoraOverEmbedding):
    """DoRA over a subclass of ``nn.Embedding`` that has a forward of its own; ``m`` is one number for each feature."""

    lora_in_first = True


class DoraEmbedding(DoraOverEmbedding, nn.Embedding):  # type: ignore[misc]  # forward takes one argument
    """``nn.Embedding`` with DoRA, ``y = m/‖W + s (B A)ᵀ‖ ⊙ (W[x] + s · A[:, x]ᵀ Bᵀ)``."""
