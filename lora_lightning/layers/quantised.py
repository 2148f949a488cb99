"""Adapted linear layers over a base in few bits (QLoRA).

The base's output is made by its library; the update is added to it in float. As numbers the weight exists only where a
product with it is made: inside the library in forward, and here for the gradient of the input. What autograd keeps is
the input and what is ``r`` wide. Source: QLoRA, arXiv 2305.14314, equation 5.

Shapes: ``T`` tokens, ``in``/``out`` the sides of the weight, ``r`` the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.bias import BiasLayer
from lora_lightning.layers.bits import Bits, bits_of
from lora_lightning.layers.dora import DoraLayer
from lora_lightning.layers.dora_functional import ratio
from lora_lightning.layers.dora_norm import adapted_norms, remembered
from lora_lightning.layers.dropout import add_product, draw, without
from lora_lightning.layers.functional import (
    PLAIN,
    Adapted,
    Needs,
    as_forward,
    gradients_of,
    into_rank,
    shaped,
    transformed,
)
from lora_lightning.layers.linear import LoraOverLinear


class LoraQuantised(LoraOverLinear):
    """Adapter over a linear layer whose weight is in few bits, ``y = base(x) + s · (drop(x) Aᵀ) Bᵀ``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y = self._written_out(*args, **kwargs)
        return super().forward(*args, **kwargs) if y is None else y

    def _written_out(self, x: Any = None, **kwargs: Any) -> Tensor | None:
        """The base's output with ``s · B A x`` added, by gradients written out; None where others are wanted."""
        x, bits = kwargs.get("input", x), bits_of(self)
        if not self.lora_enabled or bits is None or not self._is_plain(x):
            return None
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return _Quantised.apply(x, self._active_dropout, self.lora_scaling, self, bits, self.bias, a, b)

    def _is_plain(self, x: Any) -> bool:
        """Whether all are plain tensors, and nothing is at work that wants operations it knows."""
        return (
            type(x) in PLAIN
            and type(self.lora_A) in PLAIN
            and not self.weight.requires_grad
            and not torch.compiler.is_compiling()
            and not transformed()
        )

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """As :func:`~lora_lightning.layers.bits.keep_order` says, also for a layer that is in no model."""
        return False

    def lora_base_output(self, x: Tensor) -> Tensor:
        """What the layer's own class makes of ``x``: ``(..., in) -> (..., out)``."""
        return super(LoraLayer, self).forward(x)

    # ---- merging: as numbers the weight is made for the moment, and in few bits again afterwards

    def lora_unmergeable(self) -> str | None:
        """Bits that are known here can be made anew."""
        return super().lora_unmergeable() if bits_of(self) is None else None

    def lora_base_value(self, name: str) -> Tensor:
        """The weight as numbers, ``(out, in)``; other tensors as they are."""
        bits = bits_of(self) if name == "weight" else None
        return super().lora_base_value(name) if bits is None else bits.numbers()

    def lora_write(self, name: str, value: Tensor) -> None:
        """Quantise a value as the weight was; other tensors as they are."""
        bits = bits_of(self) if name == "weight" else None
        if bits is not None:
            bits.like(value).put(self)
            return
        super().lora_write(name, value)
        if callable(forget := getattr(getattr(self, "state", None), "reset_grads", None)):
            forget()  # what a forward of 8 bits has made of a weight that is in float16

    def lora_keep(self, name: str) -> Callable[[], object]:
        """What puts a tensor back as it is now, to the bit: a weight is not written into but replaced."""
        bits = bits_of(self) if name == "weight" else None
        return super().lora_keep(name) if bits is None else lambda: bits.put(self)


class DoraQuantised(DoraLayer, LoraQuantised):
    """DoRA over such a layer, ``y = m/‖W + s B A‖ ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b``, the norm of the numbers."""

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """The magnitudes start as norms of the weight as it will be while training."""
        if bits_of(layer) is not None:
            return None
        if getattr(getattr(layer, "state", None), "has_fp16_weights", False):
            return super().lora_hindrance(layer)
        return (
            "DoRA needs the norms of its weight, which is not quantised yet: move the model to its device first, "
            "which is when bitsandbytes quantises"
        )

    def _norm(self) -> Tensor:
        bits = bits_of(self)
        if bits is None:
            return super()._norm()
        return adapted_norms(bits.numbers(torch.float32), self.lora_A, self.lora_B, self.lora_scaling)

    def lora_norm(self) -> Tensor:
        """``‖W + s B A‖`` of each output, ``(out,)``; the base is frozen, so that only the adapter is watched."""
        return remembered(self, (self.lora_A, self.lora_B), self.lora_scaling, self._norm)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in) -> (..., out)``."""
        z = self._written_out(*args, **kwargs)
        if z is None:
            return DoraLayer.forward(self, *args, **kwargs)
        c, bias = ratio(self.lora_magnitude, self.lora_norm()), cast("Tensor | None", self.bias)
        return (c * z).to(z.dtype) if bias is None else (c * (z - bias)).to(z.dtype) + bias


class BiasQuantised(BiasLayer, LoraQuantised):
    """Such a layer with a bias on ``B``, ``y = base(x) + s · ((drop(x) Aᵀ) Bᵀ + b_B)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y = self._written_out(*args, **kwargs)
        return LoraLayer.forward(self, *args, **kwargs) if y is None else y + self.lora_delta_of("bias").to(y.dtype)


QUANTISED_KINDS: dict[str, type[LoraLayer]] = {
    "lora": LoraQuantised,
    "dora": DoraQuantised,
    "lora_bias": BiasQuantised,
}
"""What is put over a linear layer in few bits, by variant."""


class _Quantised(torch.autograd.Function):
    """``dx = dy W + kept'(g A)`` with ``g = s/(1-p) · dy B``; ``dA``, ``dB`` as of any layer, for a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropout: float,
        scaling: float,
        layer: LoraQuantised,
        bits: Bits,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        x_flat = x.reshape(-1, x.shape[-1])  # (T, in)
        y = layer.lora_base_output(x_flat)
        ctx.bits, ctx.base_dtype = bits, getattr(layer, "compute_dtype", None) or a.dtype
        low = x_flat.to(a.dtype)
        dropped = draw(low, dropout) if dropout else None
        xa = (low if dropped is None else without(low, dropped, dropout)) @ a.t()  # (T, r)
        scale = scaling / (1 - dropout)
        if y.dtype == xa.dtype:
            y.addmm_(xa, b.t(), alpha=scale)
        else:
            y += (xa @ b.t()).mul_(scale)
        ctx.dropout, ctx.scaling, ctx.shape, ctx.dtype = dropout, scaling, x.shape, x.dtype
        needs_x, *_, needs_a, needs_b = ctx.needs_input_grad
        # The input as it came: others on it (query, key, value) keep the same tensor, and not a rounded copy each.
        ctx.save_for_backward(
            x if needs_a else None,
            dropped if needs_a or needs_x else None,
            xa if needs_b else None,
            a,
            b,
        )
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, dropped, xa, a, b = ctx.saved_tensors
        needs_x, *_, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        dtype = ctx.base_dtype
        layer = Adapted(a.new_empty(0), None, a, b, ctx.scaling)
        dy_flat = dy.reshape(-1, dy.shape[-1])  # (T, out)
        dy_low = dy_flat.to(a.dtype)
        g = into_rank(dy_low, layer, ctx.dropout) if needs_x or needs_a else None  # (T, r)
        dx = kept = None
        if needs_x and g is not None:
            dx = (dy_flat.to(dtype) @ ctx.bits.numbers(dtype)).to(a.dtype)
            add_product(dx, g, a, dropped, ctx.dropout)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        if needs_a:
            low = x.reshape(-1, x.shape[-1]).to(a.dtype)
            kept = low if dropped is None else without(low, dropped, ctx.dropout)
        needs = Needs(False, needs_bias, needs_a, needs_b)
        ((_, dbias, da, db),) = gradients_of([dy_low], x, kept, g, [xa], ctx.dropout, [layer], [needs])
        return dx, None, None, None, None, dbias, da, db
