"""Many spread tensors made whole by few exchanges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lora_lightning.injection.tensors import whole

_TOGETHER = 4 << 20  # bytes, whole, of one exchange: few exchanges, and little memory beside what comes out


@torch.no_grad()
def whole_together(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The whole of each tensor, in order; every process takes all of them, with the same tensors.

    Those that are split along one dimension over one mesh, as FSDP2 splits them, are exchanged together; a process may
    have nothing of one. Others are exchanged one at a time, and those that are not spread are given as they are.
    """
    pending: list[DTensor] = []
    for tensor in tensors:
        if pending and (not _joins(tensor, pending[0]) or _bytes([*pending, tensor]) > _TOGETHER):
            yield from _exchange(pending)
            pending = []
        if _joins(tensor, tensor):
            pending.append(tensor)  # type: ignore[arg-type]
        else:
            yield whole(tensor)
    if pending:
        yield from _exchange(pending)


def _joins(tensor: Tensor, other: Tensor) -> bool:
    return (
        isinstance(tensor, DTensor)
        and isinstance(other, DTensor)
        and tensor.device_mesh == other.device_mesh
        and tensor.device_mesh.ndim == 1
        and type(tensor.placements[0]) is Shard
        and tensor.dtype == other.dtype
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _exchange(tensors: Sequence[DTensor]) -> Iterator[Tensor]:
    mesh = tensors[0].device_mesh
    ways = mesh.size()
    shapes = [_shapes(tensor, ways) for tensor in tensors]  # of each tensor, every process's part
    lengths = [[shape[rank].numel() for shape in shapes] for rank in range(ways)]
    local = [tensor.to_local().reshape(-1) for tensor in tensors]
    longest = max(map(sum, lengths))
    flat = torch.cat([*local, local[0].new_zeros(longest - sum(len(part) for part in local))])
    received = flat.new_empty(ways * longest)
    dist.all_gather(list(received.view(ways, longest)), flat, group=mesh.get_group())
    parts = [row[: sum(some)].split(some) for row, some in zip(received.view(ways, longest), lengths, strict=True)]
    for number, tensor in enumerate(tensors):
        pieces = [parts[rank][number].view(shapes[number][rank]) for rank in range(ways)]
        yield torch.cat(pieces, dim=tensor.placements[0].dim)  # type: ignore[attr-defined]


def _shapes(tensor: DTensor, ways: int) -> list[torch.Size]:
    """As ``torch.chunk`` cuts: equal parts, then a smaller one, then empty ones."""
    dim: int = tensor.placements[0].dim  # type: ignore[attr-defined]
    size = tensor.shape[dim]
    each = -(-size // ways)
    taken = [max(min(each, size - rank * each), 0) for rank in range(ways)]
    return [torch.Size([*tensor.shape[:dim], part, *tensor.shape[dim + 1 :]]) for part in taken]
