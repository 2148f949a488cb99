"""What one step takes in memory, counted tensor by tensor while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.tasks.live_bytes import LiveBytes
from lora_lightning.tasks.loss import causal_lm_loss


class StepBytes(NamedTuple):
    """What a step takes besides parameters and batch."""

    kept: int
    """Alive when forward has ended: what backward will look at."""
    passing: int
    """How many more there are at most in backward."""


def step_bytes(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> StepBytes:
    """Run one step of an adapted model and count; generators are afterwards as they were before.

    Args:
        model: A causal language model in training mode, some of whose parameters train. It gets no gradients.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, (B, T), where the model is.
        precision: A Trainer's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    counter = _CudaBytes(device) if device.type == "cuda" else LiveBytes()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), counter:
        with _autocast(device, precision):
            total = causal_lm_loss(model, batch).total
        kept = counter.now
        torch.autograd.grad(total, trained)
    return StepBytes(kept, max(0, counter.most - kept))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


class _CudaBytes:
    """The same, told by CUDA's own allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _CudaBytes:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before
