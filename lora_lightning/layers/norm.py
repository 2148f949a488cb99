"""Root-mean-square normalisation with a frozen weight: the input and one number a row are kept, not three copies.

Source: *Root Mean Square Layer Normalization*, arXiv 1910.07467, as the models of transformers write it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_lightning.layers.functional import PLAIN, shaped, transformed
from lora_lightning.layers.made import replaced
from lora_lightning.layers.written import kernels_for

_BODY = """def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return """
FORMULAS = {f"{_BODY}self.weight * x.to(dtype)": False, f"{_BODY}(self.weight * x).to(dtype)": True}
"""What the forward of a class says to which one of the norms here may be put over, and whether it rounds last."""


_WIDEST = 16384  # a row that one program of the kernel holds


class LoraNorm(nn.Module):
    """Normalises as its class does, to the bit; in backward it computes with what it kept."""

    weight: Tensor
    variance_epsilon: float
    lora_rounds_last = False
    lora_read: Callable
    """The forward of the class that was read."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., d) -> (..., d)``."""
        theirs = super().forward
        if (
            kwargs
            or len(args) != 1
            or type(args[0]) not in PLAIN
            or type(self.weight) not in PLAIN
            or args[0].dtype == torch.float64  # theirs rounds to single precision on the way
            or not (torch.is_grad_enabled() and args[0].requires_grad)
            or self.weight.requires_grad
            or torch.compiler.is_compiling()
            or transformed()
            or replaced(theirs, self.lora_read)
        ):
            return theirs(*args, **kwargs)
        return _Norm.apply(args[0], self.weight, self.variance_epsilon, self.lora_rounds_last)


class LoraNormRoundingLast(LoraNorm):
    """The same where the product with the weight is taken before rounding to the input's dtype."""

    lora_rounds_last = True


class _Norm(torch.autograd.Function):
    """``y = x ρ w`` with ``ρ = 1/√(mean(x²) + ε)`` and ``dx = ρ (w dy - x ρ² mean(w dy x))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, rounds_last: bool) -> Tensor:
        if x.dtype == weight.dtype and x.shape[-1] <= _WIDEST and (kernels := kernels_for(x)) is not None:
            x_flat = x.reshape(-1, x.shape[-1]).contiguous()
            y, rho = kernels.norm(x_flat, weight, epsilon, rounds_last)
            ctx.save_for_backward(x_flat, weight, rho)
            return shaped(y, x)
        wide = x if x.dtype == torch.float32 else x.float()
        rho = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, weight, rho)
        normal = wide * rho
        if normal.dtype == x.dtype == weight.dtype:
            return normal.mul_(weight)
        return (weight * normal).to(x.dtype) if rounds_last else weight * normal.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, rho = ctx.saved_tensors
        if rho.dim() < x.dim():  # the kernels'
            dy_flat = dy.reshape(-1, dy.shape[-1]).contiguous()
            kernels = cast("ModuleType", kernels_for(x))
            return kernels.norm_backward(dy_flat, x, weight, rho).view(dy.shape), None, None, None
        wide = x.float()
        wdy = dy * weight if dy.dtype == weight.dtype == torch.float32 else dy.float() * weight
        along = torch.linalg.vecdot(wdy, wide).unsqueeze(-1).mul_(rho.pow(3))
        return wdy.mul_(rho).addcmul_(wide, along, value=-1 / x.shape[-1]).to(x.dtype), None, None, None
