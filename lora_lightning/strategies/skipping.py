"""Samplers that leave out the beginning of an epoch, without a row being loaded for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.strategies.position import Position


class Skipping:
    """A sampler whose next iteration leaves out what the position says, without a row being loaded for it."""

    def __init__(self, sampler: Iterable[Any], position: Position) -> None:
        self.sampler, self.position = sampler, position

    def __iter__(self) -> Iterator[Any]:
        self.position.numbers = Numbers(iter(self.sampler), self.position.skip)
        return self.position.numbers

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class Numbers:
    """What a sampler gives, without the first ``skip`` of it."""

    def __init__(self, numbers: Iterator[Any], skip: int | None) -> None:
        self.numbers, self.skip = numbers, skip

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.begin()
        return next(self.numbers)

    def begin(self) -> None:
        """Leave out what is to be left out; the order is drawn with the first of it, also where that is to be kept."""
        skip, self.skip = self.skip, None
        if skip is not None:
            taken = list(islice(self.numbers, skip or 1))
            self.numbers = self.numbers if skip else chain(taken, self.numbers)
