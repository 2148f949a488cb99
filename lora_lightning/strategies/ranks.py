"""What every process has of something."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def first_with_same_rows(strategy: Any) -> int:
    """The first of the processes that see the rows of this one: itself, or the first of its tensor-parallel group.

    What those draw has to be the same on all of them, whatever each had drawn under another strategy.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    mesh = getattr(strategy, "device_mesh", None)
    if mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()):
        return dist.get_rank()
    return min(dist.get_process_group_ranks(mesh["tensor_parallel"].get_group()))


def of_all_ranks(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's object in order of rank, on every process; call it on all of them.

    Args:
        mine: This process's; it is pickled.
        group: The processes; None is all there are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
