"""What is wrong with gradients, told by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_lightning.injection.tensors import norms, whole


def are_finite(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Whether all gradients are finite, a scalar on their device; nothing waits for it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return norms(grads).isfinite().all() if grads else torch.ones((), dtype=torch.bool)


def not_finite(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of parameters whose gradient has a NaN or an infinity on any process."""
    named = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not named or bool(norms(list(named.values())).isfinite().all()):
        return []
    bad = [name for name, grad in named.items() if not bool(whole(grad).isfinite().all())]
    return bad or list(named)  # each is finite, and the norm is not: too large for its dtype


def without_gradient(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of parameters that took no part in the loss."""
    return [name for name, p in parameters.items() if p.grad is None]
