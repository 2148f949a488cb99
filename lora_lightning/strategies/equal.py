"""Whether tensors are the same on several processes, found out by exchanging a number for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.errors import AdapterError
from lora_lightning.strategies.ranks import of_all_ranks

_CHUNKS = 64


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A number, int64 on the tensor's device, that is the same for the same bits and hardly ever for others.

    The tensor is read once and not copied: its bytes, taken as 64-bit words, are summed in 64 chunks, and the sums are
    summed again, each with an odd weight of its own, so that it matters which chunk a value is in.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words of 8 bytes begin at multiples of 8
    octets = flat.view(torch.uint8)
    even = len(octets) // (8 * _CHUNKS) * 8 * _CHUNKS
    sums = octets[:even].view(torch.int64).view(_CHUNKS, -1).sum(1)
    weights = torch.arange(1, 2 * _CHUNKS, 2, device=flat.device)
    rest = octets[even:].to(torch.int64)
    return (sums * weights).sum() + (rest * torch.arange(3, 3 + len(rest), device=flat.device)).sum()


def differing(named: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, list[int]]:
    """Names of tensors that are not the same on all processes, each with the ranks that have not the first one's.

    Args:
        named: Tensors by name; of a ``DTensor`` this process's part. One that is split among the processes of the
            group is passed over: everyone has another part of it.
        group: Processes to compare, all of which call this; None is all there are. A single process differs from
            nobody.

    Raises:
        AdapterError: If processes have tensors of different names.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return {}
    ranks = dist.get_process_group_ranks(group)
    comparable = {name: t for name, tensor in named.items() if (t := _own(tensor, ranks)) is not None}
    sums = [digest(tensor) for tensor in comparable.values()]
    mine = (list(comparable), _numbers(sums))
    everyone = of_all_ranks(mine, group)
    for rank, (names, _) in zip(ranks, everyone, strict=True):
        if names != everyone[0][0]:
            odd = sorted(set(names) ^ set(everyone[0][0])) or names
            raise AdapterError(
                f"rank {rank} has other tensors than rank {ranks[0]} ({len(names)} and {len(everyone[0][0])}; the "
                f"first that differs: {odd[0] if odd else 'none'}): all ranks have to build the same model with the "
                "same LoRA config"
            )
    found: dict[str, list[int]] = {}
    for position, name in enumerate(mine[0]):
        first = everyone[0][1][position]
        if odd_ones := [rank for rank, (_, s) in zip(ranks, everyone, strict=True) if s[position] != first]:
            found[name] = odd_ones
    return found


def _numbers(sums: list[Tensor]) -> list[int]:
    """Scalars as numbers, fetched from each device at once."""
    found = dict.fromkeys(range(len(sums)), 0)
    for device in {s.device for s in sums}:
        places = [place for place, s in enumerate(sums) if s.device == device]
        found.update(zip(places, torch.stack([sums[place] for place in places]).tolist(), strict=True))
    return list(found.values())


def assert_equal_across_ranks(named: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """See that adapters are the same on all processes of a group, bit for bit.

    Args:
        named: Tensors by name, as for :func:`differing`.
        group: Processes that are to have the same; None is all there are.

    Raises:
        AdapterError: If they are not; on every process, so that all of them stop.
    """
    if found := differing(named, group):
        name, ranks = next(iter(found.items()))
        several = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
        raise AdapterError(
            f"adapters have drifted apart: {name}{several} on rank{'s' * (len(ranks) > 1)} "
            f"{', '.join(map(str, ranks))} is not what rank {dist.get_process_group_ranks(group)[0]} has. Something "
            "changes them on single ranks (an optimizer step or a loss that depends on the rank, a hook that runs on "
            "one of them only); what one rank would save is not the result of the training"
        )


def _own(tensor: Tensor, ranks: list[int]) -> Tensor | None:
    """This process's part of a tensor, or None where the given ranks have different parts of it."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        together = set(dist.get_process_group_ranks(mesh.get_group(dim))) & set(ranks)
        if not placement.is_replicate() and len(together) > 1:
            return None
    return tensor.to_local()
