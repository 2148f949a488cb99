"""Packed rows: several examples behind one another, so that next to nothing is padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lora_lightning.data.encode import IGNORED, Example


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Deal examples to rows: each to the fullest row that has room for it.

    Dealt in descending order, they need at most 11/9 of the fewest rows possible, and one (Johnson, 1973).

    Args:
        lengths: In tokens; one longer than ``capacity`` has a row of its own.
        capacity: Of a row, in tokens.

    Returns:
        The row of each example, and the number of rows.

    >>> best_fit([6, 5, 4, 3, 2], 10)
    ([0, 1, 0, 1, 1], 2)
    """
    rows_with: dict[int, list[int]] = {}  # by the room they have left
    rooms = 0  # bit n is set where some row has room for n
    row_of, count = [], 0
    for length in lengths:
        fitting = rooms >> length
        if fitting and length <= capacity:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            row, room, count = count, max(capacity, length), count + 1
        if left := room - length:
            rows_with.setdefault(left, []).append(row)
            rooms |= 1 << left
        row_of.append(row)
    return row_of, count


def packed(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Rows of examples, each to the fullest row that has room for it."""
    longest_first = sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True)
    row_of, count = best_fit([len(example["input_ids"]) for example in longest_first], capacity)
    rows: list[list[Example]] = [[] for _ in range(count)]
    for example, row in zip(longest_first, row_of, strict=True):
        rows[row].append(example)
    return rows


def how_full(lengths: Sequence[int], capacity: int) -> str:
    """A sentence for people about what packing makes of examples.

    >>> how_full([6, 5, 4, 3, 1], 10)
    'Packed: 5 examples in 2 rows of up to 10 tokens, which are 95 % full.'
    """
    rows = best_fit(sorted(lengths, reverse=True), capacity)[1]
    full = f"{100 * sum(lengths) / (rows * capacity):.0f} % full"
    return f"Packed: {len(lengths):,} examples in {rows:,} rows of up to {capacity:,} tokens, which are {full}."


class PackingSampler(DistributedSampler):
    """Rows for training, each a tuple of the numbers of its examples; every example once an epoch.

    Which lengths go together is settled once, so that every epoch has equally many batches; which of the examples of a
    length goes where is drawn anew for each epoch, as is the order of the rows. The fullest row comes first, so that a
    run that lacks memory ends at once. Where the rows do not divide evenly among the ranks, some are parted; only where
    none has two examples do fewer rows than there are ranks come twice.

    It is a ``DistributedSampler`` so that Lightning leaves it in its place and calls ``set_epoch``.

    Args:
        lengths: Of each example, in tokens.
        capacity: Of a row, in tokens.
        seed: The same on every rank.
        rank: Of this process.
        world: The number of ranks.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.lengths = lengths
        dealt = sorted(lengths, reverse=True)
        row_of, rows = best_fit(dealt, capacity)
        self.row_of = _parted(row_of, rows, -rows % world)
        """The row of the longest example, of the second longest …"""
        count: Any = range(max(self.row_of, default=-1) + 1)  # all that is asked of a data set here is its length
        super().__init__(count, num_replicas=world, rank=rank, seed=seed)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.order()[self.rank :: self.num_replicas])

    def order(self) -> list[tuple[int, ...]]:
        """The rows of this epoch for all ranks together: row ``i`` is for rank ``i % world``."""
        chance = random.Random(f"{self.seed}/{self.epoch}")
        examples = list(range(len(self.lengths)))
        chance.shuffle(examples)
        examples.sort(key=self.lengths.__getitem__, reverse=True)  # those of one length stay shuffled
        rows: list[list[int]] = [[] for _ in range(len(self.dataset))]  # type: ignore[arg-type]
        for example, row in zip(examples, self.row_of, strict=True):
            rows[row].append(example)
        for row_ in rows:
            chance.shuffle(row_)
        chance.shuffle(rows)
        fullest = max(range(len(rows)), key=lambda place: sum(self.lengths[example] for example in rows[place]))
        rows.insert(0, rows.pop(fullest))
        rows += (rows * self.num_replicas)[: self.total_size - len(rows)]
        return [tuple(row_) for row_ in rows]


def _parted(row_of: list[int], rows: int, more: int) -> list[int]:
    """The same, with some examples in further rows, so that there are ``more`` rows, if there can be."""
    counts = [0] * rows
    for row in row_of:
        counts[row] += 1
    row_of = list(row_of)
    # From the end: the shortest examples are moved, and rows of their own cost least in the last batch.
    for place in reversed(range(len(row_of))):
        if more and counts[row_of[place]] > 1:
            counts[row_of[place]] -= 1
            row_of[place], more = len(counts), more - 1
            counts.append(1)
    return row_of


class PackedRows(Dataset):
    """What a `PackingSampler` asks for: the examples of a row.

    Args:
        examples: In order.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Sequence[int]) -> list[Example]:
        return [self.examples[number] for number in row]


class PackingCollator:
    """Puts the examples of each row behind one another.

    What is missing at the end of a row is an example of padding, so it is seen by no other, and has no labels.

    Args:
        pad_token_id: Stands where there is no token.
        pad_to_multiple_of: Round lengths up to a multiple of this (tensor cores like 8).
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: B of them, each of one example or more.

        Returns:
            ``input_ids``, ``labels`` (-100 at the first token of each example, before which nothing stands to predict
            it) and ``position_ids`` (0 there), each (B, T) int64; ``tokens_in_row`` (B,), padding not counted. There is
            no ``attention_mask``: from one, transformers would conclude that the rows are not packed.
        """
        tokens = [sum(len(example["input_ids"]) for example in row) for row in rows]
        width = -(-max(tokens) // self.multiple) * self.multiple
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),
            "labels": torch.full((len(rows), width), IGNORED),
            "position_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        }
        for number, row in enumerate(rows):
            begin = 0
            for example in row:
                end = begin + len(example["input_ids"])
                batch["input_ids"][number, begin:end] = example["input_ids"]
                batch["labels"][number, begin + 1 : end] = example["labels"][1:]
                batch["position_ids"][number, begin:end] = torch.arange(end - begin)
                begin = end
            batch["position_ids"][number, begin:] = torch.arange(width - begin)
        return {**batch, "tokens_in_row": torch.tensor(tokens)}
