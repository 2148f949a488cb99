"""Tensors that a sharding engine spreads over processes: made whole, and whole ones spread as another is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor: itself, or what all processes' parts of a ``DTensor`` make up (call it on all of them)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process has whole, laid out over processes as ``model`` is; without communication.

    Args:
        value: The same on every process.
        model: A plain tensor or a ``DTensor`` of the same shape.

    Returns:
        ``value`` itself, or this process's part of it as a ``DTensor`` on the device of ``model``.
    """
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = model.device_mesh, model.placements
    there = value.to(model.to_local().device)
    if all(type(placement) is Replicate for placement in placements):
        return DTensor.from_local(there, mesh, placements, run_check=False)
    return distribute_tensor(there, mesh, placements, src_data_rank=None)


def same_kind(tensors: list[Tensor]) -> dict[object, list[int]]:
    """Positions of tensors by what a fused or foreach operation can take together: plain ones, or those of one mesh."""
    kinds: dict[object, list[int]] = {}
    for position, tensor in enumerate(tensors):
        kind = tensor.device_mesh if isinstance(tensor, DTensor) else tensor.device
        kinds.setdefault(kind, []).append(position)
    return kinds


@torch.no_grad()
def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, ``(len(tensors),)`` on the first one's device; whole norms of ``DTensor``."""
    found: list[Tensor | None] = [None] * len(tensors)
    for positions in same_kind(tensors).values():
        several = torch._foreach_norm([tensors[i] for i in positions])
        for position, norm in zip(positions, several, strict=True):
            found[position] = whole(norm)
    device = whole(found[0]).device if found and found[0] is not None else None
    return torch.stack([norm.to(device) for norm in found if norm is not None])
