"""Rotary position embedding in one pass over queries and keys, where attention is written as transformers writes it.

Source: RoFormer, arXiv 2104.09864, in the form that rotates the first half of the features against the second.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_lightning.layers.functional import PLAIN, transformed
from lora_lightning.layers.made import replaced
from lora_lightning.layers.written import kernels_for

NAME = "apply_rotary_pos_emb"
FORMULA = """def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return (q_embed, k_embed)"""
HALF_FORMULA = """def rotate_half(x):
    x1 = x[..., :x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)"""
"""What the functions say that the forward of a class calls to which :class:`LoraRotary` may be put over."""


class LoraRotary(nn.Module):
    """Attention whose forward is that of its class, but for the function that rotates queries and keys.

    Attributes:
        lora_read: The forward of the class that was read.
    """

    lora_read: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class has it."""
        theirs: Any = super().forward
        if torch.compiler.is_compiling() or replaced(theirs, self.lora_read):
            return theirs(*args, **kwargs)
        forward = self.lora_read
        # Not where someone has put another function in the place of the one that was read.
        if forward.__globals__[NAME] is not original(forward):
            return theirs(*args, **kwargs)
        return _with_rotation(forward)(self, *args, **kwargs)


@cache
def original(forward: types.FunctionType) -> Callable:
    """The function that a forward had for the rotation when it was first asked for, which is when it is read."""
    return forward.__globals__[NAME]


class _Names(dict):
    """Global names as another dict has them at each look, but for those that are given here."""

    def __init__(self, others: dict[str, Any], **own: Any) -> None:
        super().__init__(own, __builtins__=others["__builtins__"])  # looked up past __missing__
        self.others = others

    def __missing__(self, name: str) -> Any:
        return self.others[name]


@cache
def _with_rotation(forward: types.FunctionType) -> Callable:
    names = _Names(forward.__globals__, **{NAME: rotate})
    own = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries, ``(B, H, T, d)``, and keys, ``(B, K, T, d)``, rotated by their positions.

    Args:
        q: Queries.
        k: Keys.
        cos: ``(B or 1, T, d)``.
        sin: As ``cos``.
        unsqueeze_dim: Where the dimension of the heads is.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if transformed():
        return _composed(q, cos, sin), _composed(k, cos, sin)
    return tuple(_Rotate.apply(x, cos, sin) if _fits(x, cos, sin) else _composed(x, cos, sin) for x in (q, k))  # type: ignore[return-value]


def _composed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the work is written out for such tensors, with the rounding of the composed operations."""
    return (
        type(x) in PLAIN
        and type(cos) in PLAIN
        and x.dtype == cos.dtype == sin.dtype
        and x.shape[-1] == cos.shape[-1]
        and x.shape[-1] % 2 == 0
        and x.dim() == cos.dim() == 4
        and not (cos.requires_grad or sin.requires_grad)
        and (x.dtype in (torch.float32, torch.float64) or kernels_for(x) is not None)
    )


class _Rotate(torch.autograd.Function):
    """``y₁ = x₁ c₁ - x₂ s₁``, ``y₂ = x₂ c₂ + x₁ s₂`` for the halves of the features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if (kernels := kernels_for(x)) is not None:
            return kernels.rotate(x, cos, sin, backward=False)
        (x1, x2), (s1, s2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        y = x * cos
        y1, y2 = y.chunk(2, dim=-1)
        y1.sub_(x2 * s1)  # not addcmul_, which may round once where two operations round twice
        y2.add_(x1 * s2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if (kernels := kernels_for(dy)) is not None:
            return kernels.rotate(dy, cos, sin, backward=True), None, None
        (dy1, dy2), (s1, s2) = dy.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        dx = dy * cos
        dx1, dx2 = dx.chunk(2, dim=-1)
        dx1.addcmul_(dy2, s2)
        dx2.addcmul_(dy1, s1, value=-1)
        return dx, None, None
