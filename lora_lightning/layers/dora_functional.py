"""The mathematics of DoRA: ``y = m/‖W + s B A‖ ⊙ (x Wᵀ + s · drop(x) Aᵀ Bᵀ) + b``, the norm without a gradient.

Shapes: ``T`` tokens, ``in``/``out`` the sides of the weight, ``r`` the rank. Below, ``z`` is what stands in brackets
and ``c = m/‖…‖``, one number for each output. Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.

The paper's authors and PEFT also drop ``x`` on the way to ``(c - 1) ⊙ x Wᵀ`` in training, which takes a second product
with ``W`` in both passes; the mean is the same, and so is everything where there is no dropout. Here ``W`` always sees
the whole ``x``, as it does without DoRA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.layers.functional import (
    Adapted,
    Needs,
    backward_of,
    forward_of,
    in_one_dtype,
    low_rank,
    written_out,
)

_SMALLEST = {torch.float16: 2.0**-10, torch.float64: 2.0**-100}  # of c, so that y / c has the digits of z


def dora_linear(x: Tensor, layer: Adapted, magnitude: Tensor, norm: Tensor, dropout: float = 0.0) -> Tensor:
    """``y = m/norm ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b``, in the dtype of ``x`` (autocast's where it is on).

    Args:
        x: Input, ``(..., in)``.
        layer: The layer's tensors.
        magnitude: ``m``, ``(out,)``.
        norm: ``‖W + s B A‖`` of each output, ``(out,)``, in float32 at least; no gradient goes through it.
        dropout: Probability of dropping an element of ``x`` on its way to ``A``; 0 outside training.

    Returns:
        ``(..., out)``.
    """
    x, (layer,) = in_one_dtype(x, [layer])
    if written_out(x, [layer]) and written_out(magnitude, []):
        return _DoraLinear.apply(x, *layer[:4], magnitude, norm, layer.scaling, dropout)
    z = F.linear(x, layer.weight) + low_rank(x, layer.a, layer.b, layer.scaling, dropout)
    y = (z * ratio(magnitude, norm)).to(x.dtype)
    return y if layer.bias is None else y + layer.bias


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = m/norm``, ``(out,)``; 1 where the norm is zero, since there is nothing to scale."""
    norm = norm.detach()
    return torch.where(norm == 0, 1, magnitude / norm)


class _DoraLinear(torch.autograd.Function):
    """Forward and backward written out.

    With ``d = dy ⊙ c`` the gradients are those of the layer without DoRA for ``d``, and ``dm = Σ dy ⊙ z / norm`` over
    tokens. Without a bias ``z`` is taken back from the output, ``z = y / c``, which the next operation most often
    keeps anyway; where something has overwritten the output since, it is computed again. A ``c`` too small for that
    counts as the smallest that is not. With a bias, a large one would leave too few digits of ``z``: it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        layer = Adapted(weight, None, a, b, scaling)
        (z,), dropped, (xa,) = forward_of(x.reshape(-1, x.shape[-1]), dropout, [layer])
        c = ratio(magnitude, norm)
        divisor = torch.where(norm == 0, 1, norm)  # dm = Σ dy ⊙ kept / divisor
        if bias is None:
            smallest = _SMALLEST.get(z.dtype, 2.0**-40)
            c = torch.where(c.abs() < smallest, torch.copysign(torch.full_like(c, smallest), c), c)
            divisor = divisor * c
            kept = flat = z.mul_(c)
        else:
            kept, flat = z, torch.mul(z, c, out=torch.empty_like(z)).add_(bias)
        # Not a view of it, which nobody could write into.
        y = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])
        needs_x, needs_w, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        ctx.scaling, ctx.dropout, ctx.leading = scaling, dropout, x.shape[:-1]
        takes_back = needs_m and bias is None
        final = torch.compiler.is_compiling() or y.is_inference()  # nothing overwrites it, or there is no backward
        ctx.watch = _Watch(y) if takes_back and not final else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if needs_w or needs_a or takes_back else None,
            weight if needs_x or takes_back else None,
            a if needs_x or needs_a else None,
            b if needs_x or needs_a or takes_back else None,
            xa if needs_b or takes_back else None,
            dropped if needs_x or needs_w or needs_a else None,
            kept if needs_m else None,
            c,
            divisor if needs_m else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, weight, a, b, xa, dropped, kept, c, divisor = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        layer = Adapted(weight, None, a, b, ctx.scaling)
        x = x if x is None else x.reshape(-1, x.shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
        d = torch.empty_like(dy)
        dm = None
        if needs_m:
            if ctx.watch is not None and ctx.watch.changed:
                scale = ctx.scaling / (1 - ctx.dropout)
                kept = F.linear(x, weight).addmm_(xa, b.t(), alpha=scale).mul_(c)
            dm = torch.mul(dy, kept, out=d).sum(0, dtype=divisor.dtype) / divisor
        torch.mul(dy, c, out=d)
        needs = [Needs(needs_w, False, needs_a, needs_b)]
        dx, ((dw, _, da, db),) = backward_of([d], x, dropped, [xa], ctx.dropout, [layer], needs_x, needs)
        dx = dx if dx is None else dx.view(*ctx.leading, dx.shape[-1])
        return dx, dw, dy.sum(0) if needs_bias else None, da, db, dm, None, None, None


class _Watch:
    """Tells whether a tensor has been written into since, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._twin = tensor.detach()  # shares the count of changes, and goes on doing so without the data
        self._twin.data = tensor.new_empty(0)
        self._version = self._twin._version

    @property
    def changed(self) -> bool:
        """Whether it was."""
        return self._twin._version != self._version
