"""Gradients of adapters that every process has whole beside a base that is spread over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average gradients over the processes of a group, in place, by one exchange for each dtype.

    A parameter that got no gradient on this process counts as zero, and stays without where none of them got one (an
    expert that no token went to).

    Args:
        parameters: The same on every process, in the same order; plain or ``DTensor``, whose local parts are averaged.
        group: Processes that saw different data.
    """
    size = dist.get_world_size(group)
    for several in _alike(parameters):
        dtype = several[0].dtype
        parts = [_local(p) for p in several]
        present = torch.tensor([p.grad is not None for p in several], dtype=dtype, device=parts[0].device)
        flat = torch.cat([present, *(part.reshape(-1) for part in parts)])
        dist.all_reduce(flat, group=group)
        seen, *sums = flat.split([len(several), *(part.numel() for part in parts)])
        for parameter, part, total, count in zip(several, parts, sums, seen.tolist(), strict=True):
            if count:
                _take(parameter, (total / size).view_as(part))


@torch.no_grad()
def broadcast(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Give all processes of a group the values that its first one has, in place, by one exchange for each dtype."""
    for several in _alike(parameters):
        flat = torch.cat([p.reshape(-1) for p in several])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
        for p, values in zip(several, flat.split([p.numel() for p in several]), strict=True):
            p.copy_(values.view_as(p))


def _alike(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one dtype on one device, which one exchange can take together."""
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.dtype, p.device), []).append(p)
    return list(groups.values())


@torch.no_grad()
def settle(parameters: Sequence[nn.Parameter]) -> None:
    """Bring gradients that are still sums to be made over a tensor-parallel mesh into their parameters' layout."""
    for p in parameters:
        if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


def _local(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _take(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
    local.copy_(value)
