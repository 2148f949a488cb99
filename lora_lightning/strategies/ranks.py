"""What every process has of something."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
