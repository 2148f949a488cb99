"""Tensors that a sharding engine spreads over processes: made whole, and whole ones spread as another is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor: itself, or what all processes' parts of a ``DTensor`` make up (call it on all of them)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a ``DTensor``, with its memory; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def laid_as(value: Tensor, model: Tensor) -> Tensor:
    """A plain tensor in the order of memory of another of its shape: itself, or a copy."""
    if value.stride() == model.stride() or isinstance(value, DTensor) or isinstance(model, DTensor):
        return value
    return torch.empty_like(model, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value.detach())


def alone(tensor: Tensor) -> Tensor:
    """A plain tensor with memory of its own, in order: itself, or a copy where it is a view into more or transposed.

    What is saved of a view would be all of what it is a view of.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor
    whole_memory = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if whole_memory and tensor.is_contiguous():
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


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
    kinds = list(same_kind(tensors).values())
    if len(kinds) == 1:
        return _norms([tensors[i] for i in kinds[0]])
    several = [_norms([tensors[i] for i in positions]) for positions in kinds]
    found = torch.cat([each.to(several[0].device) for each in several])
    order = [i for positions in kinds for i in positions]
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors of one kind; of spread ones with one sum a dimension of their mesh, not one a tensor."""
    spread = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if any(placement.is_partial() for tensor in spread for placement in tensor.placements):
        tensors, spread = [whole(tensor) for tensor in tensors], []
    found = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    if not spread:
        return found
    squares = found.double().square()  # a sum of squares in the tensors' own dtype may be too large for it
    mesh = spread[0].device_mesh
    for dimension in range(mesh.ndim):
        cut = [not tensor.placements[dimension].is_replicate() for tensor in spread]
        if any(cut):
            here = torch.tensor(cut, device=squares.device)
            summed = torch.where(here, squares, 0.0)
            dist.all_reduce(summed, group=mesh.get_group(dimension))
            squares = torch.where(here, summed, squares)
    return squares.sqrt().to(found.dtype)
