"""Clipping gradients of every kind together: plain tensors, and those spread over processes."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lora_lightning.injection.tensors import local, norms, same_kind


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, clip_val: float) -> torch.Tensor:
    """Scale an optimizer's gradients down to the norm ``clip_val`` in place, if theirs is larger.

    ``torch.nn.utils.clip_grad_norm_`` refuses plain tensors beside ``DTensor``. As in it, gradients are multiplied even
    where the factor is 1, so that nothing waits for a device to tell.

    Returns:
        The norm before, a scalar. The same on all processes if their gradients are.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.zeros(())
    total = torch.linalg.vector_norm(norms(grads))
    factor = (clip_val / (total + 1e-6)).clamp(max=1.0)
    for positions in same_kind(grads).values():
        parts = [local(grads[i]) for i in positions]
        torch._foreach_mul_(parts, factor.to(parts[0].device))
    return total


@torch.no_grad()
def clip_by_value(optimizer: Optimizer, clip_val: float) -> None:
    """Bring every element of an optimizer's gradients between ``-clip_val`` and ``clip_val``, in place."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for positions in same_kind(grads).values():
        parts = [local(grads[i]) for i in positions]
        torch._foreach_clamp_min_(parts, -clip_val)
        torch._foreach_clamp_max_(parts, clip_val)
