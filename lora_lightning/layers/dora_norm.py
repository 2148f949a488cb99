"""The norms that DoRA divides by: of each output's weights in ``W + s · B A``, computed as seldom as can be.

The norm is that of the sum itself, made a few rows at a time, and not of its expansion ``‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖²``:
the arithmetic is the same and so is the time, nothing cancels where the sum is nearly zero, and ``‖W‖²`` need not be
kept and watched.

Shapes: ``weight`` is ``(out, in)``, or ``(in, out)`` where the layer stores it so; norms are ``(out,)``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_lightning.layers.functional import PLAIN, transformed

_ELEMENTS = {"cpu": 2**18}  # of the part of the sum that exists at a time: what stays in a cache
_ELEMENTS_ELSEWHERE = 2**24


def adapted_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, in_first: bool = False) -> Tensor:
    """``‖W + s · B A‖`` for each output, in float32 at least, without a gradient (DoRA, section 4.3).

    Args:
        weight: ``(out, in)``, or ``(in, out)`` with ``in_first``.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scaling: The scale ``s``.
        in_first: Whether the weight is stored ``(in, out)``.

    Returns:
        ``(out,)``; spread over processes as the outputs are where the weight is a ``DTensor``.
    """
    weight, a, b = weight.detach(), a.detach().to(weight.dtype), b.detach().to(weight.dtype)
    exact = torch.promote_types(weight.dtype, torch.float32)
    with _no_autocast(weight.device.type):
        if type(weight) not in PLAIN:
            update = beside(b, weight) @ beside(a, weight)
            whole = weight + scaling * (update.t() if in_first else update)
            return torch.linalg.vector_norm(whole, dim=0 if in_first else 1, dtype=exact)
        # The parts are of rows, so that each is one piece of memory.
        rows = max(1, _ELEMENTS.get(weight.device.type, _ELEMENTS_ELSEWHERE) // max(1, weight.shape[1]))
        left, right = (a.t(), b.t()) if in_first else (b, a)
        norms = [
            torch.linalg.vector_norm(
                torch.addmm(w, rows_of, right, alpha=scaling), dim=0 if in_first else 1, dtype=exact
            )
            for w, rows_of in zip(weight.split(rows), left.split(rows), strict=True)
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0) if in_first else torch.cat(norms)


def beside(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor that every process has whole, fit to be computed with beside a ``DTensor`` weight."""
    if not isinstance(weight, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = weight.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


_known: WeakKeyDictionary[nn.Module, tuple[Hashable, Tensor]] = WeakKeyDictionary()  # no copy, no pickle has it
_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


@functools.cache
def _count_steps() -> None:
    register_optimizer_step_post_hook(_count)


def forget(layer: nn.Module) -> None:
    """Compute anew at the next call."""
    _known.pop(layer, None)


def remembered(layer: nn.Module, tensors: tuple[Tensor, ...], scaling: float, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, or gave for a layer while neither its tensors nor its scale have changed.

    So the recomputation of activation checkpointing, the batches that one step accumulates, validation and generation
    find it made. A change is seen by a tensor's storage and version, and by any optimizer's step (fused ones leave the
    version as it is). What writes through ``.data`` leaves no trace, as where averages of weights are swapped in for
    validation: so nothing is kept over a change of mode. Where processes share the work nothing is remembered:
    sharding engines gather other values into the same memory without a trace. Nor is it under ``torch.compile`` and
    ``torch.func``.
    """
    if (
        torch.compiler.is_compiling()
        or transformed()
        or not all(type(t) in PLAIN and not t.is_inference() for t in tensors)
        or (dist.is_available() and dist.is_initialized())
    ):
        return compute()
    _count_steps()
    # A weak reference to a storage keeps its place from being given to another.
    key = (
        _steps,
        scaling,
        layer.training,
        *((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t._version, t.dtype) for t in tensors),
    )
    if (known := _known.get(layer)) is not None and known[0] == key:
        return known[1]
    with torch.inference_mode(False), torch.no_grad():  # it may be wanted in training later
        value = compute()
    _known[layer] = (key, value)
    return value
