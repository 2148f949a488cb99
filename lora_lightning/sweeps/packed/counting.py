"""What one step takes in memory, counted tensor by tensor while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    counter = _CudaBytes(device) if device.type == "cuda" else _LiveBytes()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), counter:
        with _autocast(device, precision):
            total = causal_lm_loss(model, batch).total
        kept = counter.now
        torch.autograd.grad(total, trained)
    return StepBytes(kept, max(0, counter.most - kept))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, each storage once, for as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        held = weakref.ref(storage, self._gone)
        if held not in self._sizes:
            self._sizes[held] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _gone(self, held: weakref.ref[Any]) -> None:
        self.now -= self._sizes.pop(held, 0)


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
