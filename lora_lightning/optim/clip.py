"""Clipping gradients of every kind together: plain tensors, and those spread over processes."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.injection.tensors import norms, same_kind


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, clip_val: float) -> torch.Tensor:
    """Scale an optimizer's gradients down to the norm ``clip_val`` in place, if theirs is larger.

    ``torch.nn.utils.clip_grad_norm_`` refuses plain tensors beside ``DTensor``.

    Returns:
        The norm before, a scalar. The same on all processes if their gradients are.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.zeros(())
    total = torch.linalg.vector_norm(norms(grads))
    factor = min(1.0, float(clip_val / (total + 1e-6)))
    if factor < 1:
        for positions in same_kind(grads).values():
            torch._foreach_mul_([grads[i] for i in positions], factor)
    return total


@torch.no_grad()
def clip_by_value(optimizer: Optimizer, clip_val: float) -> None:
    """Bring every element of an optimizer's gradients between ``-clip_val`` and ``clip_val``, in place."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.clamp_(-clip_val, clip_val)
