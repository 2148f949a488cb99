"""Which rows go into which batch: pure functions of (seed, epoch, rank, world size), never of global randomness."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

from torch import distributed
from torch.utils.data import Dataset, DistributedSampler

MEGABATCH = 32
"""So many batches are sorted by length together: enough to save padding, few enough to keep the order random."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where nothing is distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class LengthGroupedSampler(DistributedSampler):
    """Shuffled rows for training, in batches of rows of like length.

    It is a ``DistributedSampler`` so that Lightning leaves it in its place and calls ``set_epoch``. All ranks' batches
    of one step together are the batch that one process with the whole batch size would see. Every rank gets as many
    rows as any other; where they do not divide evenly, fewer rows than there are ranks come twice. The batch with the
    longest row comes first, so that a run that lacks memory ends at once.

    Args:
        lengths: Of each row, in tokens; None leaves the order random.
        size: The number of rows.
        batch_size: Of one rank.
        seed: The same on every rank.
        rank: Of this process.
        world: The number of ranks.
    """

    def __init__(
        self, lengths: Sequence[int] | None, size: int, *, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(_Sized(size), num_replicas=world, rank=rank, seed=seed)
        self.lengths = lengths
        self.size = size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.rank :: self.num_replicas])

    def order(self) -> list[int]:
        """The rows of this epoch for all ranks together: row ``i`` is for rank ``i % world``."""
        chance = random.Random(f"{self.seed}/{self.epoch}")
        rows = list(range(self.size))
        chance.shuffle(rows)
        rows += (rows * self.num_replicas)[: self.total_size - len(rows)]
        if self.lengths is None:
            return rows
        length = self.lengths.__getitem__
        together = self.batch_size * self.num_replicas
        mega = MEGABATCH * together
        for start in range(0, len(rows), mega):
            rows[start : start + mega] = sorted(rows[start : start + mega], key=length, reverse=True)
        batches = [rows[start : start + together] for start in range(0, len(rows), together)]
        # An incomplete batch stays the last one: anywhere else it would shift the rows of those behind it.
        last = batches.pop() if len(batches[-1]) < together else []
        chance.shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda place: length(batches[place][0]))
            batches.insert(0, batches.pop(longest))
        return [row for batch in [*batches, last] for row in batch]


class ShardSampler(DistributedSampler):
    """Rows in order for validation: each counts once, whatever the number of ranks.

    Ranks must run equally many batches (a sharded model's forward is a meeting of all ranks), so where the rows do not
    divide evenly a rank gets a filler: a number beyond the last row, which :class:`~lora_lightning.data.loaders.Rows`
    answers with a row that has no labels and so weighs nothing.

    Args:
        size: The number of rows.
        rank: Of this process.
        world: The number of ranks.
    """

    def __init__(self, size: int, *, rank: int = 0, world: int = 1) -> None:
        super().__init__(_Sized(size), num_replicas=world, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class _Sized(Dataset):
    """What torch's sampler asks a data set for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def draw(fingerprint: str, seed: int) -> float:
    """A number in [0, 1) that belongs to a row's content and the seed, wherever the row stands."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{fingerprint}".encode()).digest()[:7], "big") / 2**56


def split_rows(fingerprints: Sequence[str], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into those for training and those for validation.

    Rows with one fingerprint always fall on the same side. The split follows the rows' content and not their order.

    Args:
        fingerprints: Of each row; equal for rows that must not be parted.
        held_out: How many rows are for validation, at most.
        seed: Another seed, another split.

    Returns:
        The places of the rows for training in their order, and for validation in random order.
    """
    groups: dict[str, list[int]] = {}
    for place, fingerprint in enumerate(fingerprints):
        groups.setdefault(fingerprint, []).append(place)
    validation: list[int] = []
    for fingerprint in sorted(groups, key=lambda fingerprint: (draw(fingerprint, seed), fingerprint)):
        if len(validation) + len(groups[fingerprint]) <= held_out:
            validation += groups[fingerprint]
    held = set(validation)
    return [place for place in range(len(fingerprints)) if place not in held], validation
