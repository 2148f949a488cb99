"""Optimizers whose gradients are changed just before the step: after backward, averaging, clipping and unscaling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.tensors import local, spread_like

_O = TypeVar("_O", bound=Optimizer)


def corrected(optimizer: _O, correct: Callable[[], None], parameters: Iterable[nn.Parameter]) -> _O:
    """Have ``correct()`` change gradients at every step of an optimizer, which otherwise stays what it is.

    So it can be fused, saved and loaded as any of its class. Where a step is given a closure (Lightning hands it the
    whole of forward, backward and clipping), gradients are there once that has run.

    Args:
        optimizer: Any.
        correct: Called without gradients being recorded.
        parameters: Those whose gradients it changes.
    """
    hook = functools.partial(_before_step, correct, [id(p) for p in parameters])
    optimizer.register_step_pre_hook(hook)
    return optimizer


def _before_step(
    correct: Callable[[], None], needed: Sequence[int], optimizer: Optimizer, args: Any, kwargs: Any
) -> tuple[Any, Any] | None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held.issuperset(needed):
        raise LoraConfigError(
            f"this {type(optimizer).__name__} no longer holds the adapter's parameters, whose gradients it is to "
            "correct in pairs: an engine (DeepSpeed, ZeroRedundancyOptimizer) has put tensors of its own in their "
            "place. Take strategy='ddp', 'fsdp' or ModelParallelStrategy, or optimizer=adamw or lora_plus"
        )
    own, *given = args  # the optimizer itself comes first
    closure = given[0] if given else kwargs.get("closure")
    if closure is None:
        _corrected(correct)
        return None
    return (own, functools.partial(_closed, closure, correct)), {}


def _closed(closure: Callable[[], Any], correct: Callable[[], None]) -> Any:
    loss = closure()
    _corrected(correct)
    return loss


@torch.no_grad()
def _corrected(correct: Callable[[], None]) -> None:
    correct()


def set_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole gradient over a parameter's, in place, each process its own part."""
    gradient: Any = parameter.grad
    given = spread_like(value.reshape(parameter.shape).to(gradient.dtype), parameter)
    local(gradient).copy_(local(given))


def inverses(grams: Sequence[Tensor], damping: float) -> list[Tensor]:
    """``(G + δI)⁻¹`` of symmetric positive matrices, ``(k, r, r)`` each; those of one size all at once.

    A pseudoinverse: directions that a matrix has not, to the precision of its dtype, stay out.
    """
    found: dict[int, Tensor] = {}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, gram in enumerate(grams):
        alike.setdefault((gram.shape[-1], gram.dtype, gram.device), []).append(place)
    for (r, dtype, device), places in alike.items():
        damped = torch.cat([grams[place] for place in places]) + damping * torch.eye(r, dtype=dtype, device=device)
        parts = torch.linalg.pinv(damped, hermitian=True).split([len(grams[place]) for place in places])
        found |= dict(zip(places, parts, strict=True))
    return [found[place] for place in range(len(grams))]
