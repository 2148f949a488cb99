"""The mathematics of a low-rank update, as pure functions of tensors.

Shapes: ``T`` tokens (all leading dimensions of an input taken together), ``in``/``out`` the sides of the weight, ``r``
the rank. Source of the update: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ``, with one temporary of the output's size instead of three.

    Everything is computed in the dtype of ``x`` (autocast's where it is on); gradients arrive in the parameters' own.

    Args:
        x: Input, ``(..., in)``.
        weight: Base weight, ``(out, in)``.
        bias: Base bias, ``(out,)``, or None.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        scaling: The scale ``s``.
        dropout: Probability of dropping an element of ``x`` on its way to ``A``; 0 outside training.

    Returns:
        ``(..., out)``.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if all(type(tensor) in _PLAIN for tensor in (x, weight, lora_a, lora_b)):
        return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout)[0]
    # Tensor subclasses (DTensor, quantised weights) bring operations of their own: leave the composition to them.
    return F.linear(x, weight, bias) + low_rank(x, lora_a, lora_b, scaling, dropout)


def low_rank(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The update alone, ``s · (drop(x) Aᵀ) Bᵀ``: ``(..., in) -> (..., out)``."""
    return F.linear(F.linear(F.dropout(x, dropout), lora_a), lora_b) * scaling


def keep_mask(x: Tensor, dropout: float) -> Tensor:
    """Which elements of ``x`` survive dropout: bool of its shape, drawn from torch's generator for its device.

    On the CPU, four elements share one draw of 64 bits, so that a probability is a multiple of 2⁻¹⁶ (see
    :func:`kept_share`); drawing each element by itself takes several times as long as the layer it serves.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[: x.numel()] >= round(dropout * 2**16) - 2**15).view(x.shape)


def kept_share(x: Tensor, dropout: float) -> float:
    """The probability with which :func:`keep_mask` keeps an element."""
    return 1 - dropout if x.device.type != "cpu" else 1 - round(dropout * 2**16) / 2**16


_PLAIN = (Tensor, torch.nn.Parameter)


class _LoraLinear(torch.autograd.Function):
    """Forward and backward of an adapted linear layer, written out.

    With ``g = s · dy B``: ``dA = gᵀ drop(x)``, ``dB = s · dyᵀ (drop(x) Aᵀ)``, ``dx = dy W + drop'(g A)``. The input is
    saved once, with a mask of one byte an element where there is dropout; the dropped-out input is made again.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_flat = x.reshape(-1, x.shape[-1])  # (T, in)
        mask = keep_mask(x_flat, dropout) if dropout else None
        kept = x_flat if mask is None else torch.where(mask, x_flat, 0)
        xa = kept @ lora_a.t()  # (T, r)
        if mask is not None:
            xa /= kept_share(x, dropout)
        y = F.linear(x_flat, weight, bias).addmm_(xa, lora_b.t(), alpha=scaling)  # (T, out)
        return y.view(*x.shape[:-1], y.shape[-1]), xa, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        x, weight, bias, lora_a, lora_b, ctx.scaling, ctx.dropout = inputs
        _, xa, mask = output
        ctx.mark_non_differentiable(*([xa] if mask is None else [xa, mask]))
        ctx.has_bias = bias is not None
        # A frozen weight is needed for dx only, the input for dW and dA only: what is not needed is not kept alive.
        needs_x, needs_w, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if needs_w or needs_a else None,
            weight if needs_x else None,
            lora_a if needs_x else None,
            lora_b if needs_x or needs_a else None,
            xa if needs_b else None,
            mask if needs_x or needs_a else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, xa, mask = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        dx = dw = dbias = da = db = None
        dy_flat = dy.reshape(-1, dy.shape[-1])  # (T, out)
        share = 1.0 if mask is None else kept_share(dy, ctx.dropout)
        if needs_x or needs_a:
            g = ctx.scaling * (dy_flat @ lora_b)  # (T, r)
        if needs_x:
            dx = dy_flat @ weight  # (T, in)
            if mask is None:
                dx.addmm_(g, lora_a)
            else:
                dx.add_(torch.where(mask, g @ lora_a, 0), alpha=1 / share)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        if needs_a or needs_w:
            x_flat = x.reshape(-1, x.shape[-1])
        if needs_a:
            kept = x_flat if mask is None else torch.where(mask, x_flat, 0)
            da = (g.t() / share) @ kept  # (r, in)
        if needs_b:
            # (r, T) @ (T, out) runs row-major over the long side: 2 to 4 times faster than its transpose at small r.
            db = (ctx.scaling * (xa.t() @ dy_flat)).t()  # (out, r)
        if needs_w:
            dw = dy_flat.t() @ x_flat
        if ctx.has_bias and needs_bias:
            dbias = dy_flat.sum(0)
        return dx, dw, dbias, da, db, None, None
