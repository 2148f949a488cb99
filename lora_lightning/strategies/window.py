"""The gradients of one optimizer step, wherever a strategy keeps them."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.injection.tensors import local
from lora_lightning.strategies import zero_optimizer


def is_full(strategy: Strategy) -> bool:
    """Whether the optimizer is about to step: DeepSpeed's hook runs for every batch that it accumulates."""
    engine = getattr(strategy, "deepspeed_engine", None)
    return engine is None or engine.is_gradient_accumulation_boundary()


@torch.no_grad()
def scale_gradients(strategy: Strategy, optimizer: Optimizer, factor: Tensor) -> None:
    """Multiply the gradients of an optimizer by a scalar, in place."""
    if (engine := getattr(strategy, "deepspeed_engine", None)) is not None:
        zero_optimizer.scale_gradients(engine.optimizer, factor)
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Of a spread gradient this process's part: an operation on several tensors takes no mixture of kinds.
    if parts := [local(grad) for grad in gradients]:
        torch._foreach_mul_(parts, factor)
