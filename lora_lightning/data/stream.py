"""Rows that are read and tokenised while the model trains, for files too large to be held."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.utils.data import IterableDataset, get_worker_info

from lora_lightning.data.encode import Encoder, Example, Tally
from lora_lightning.data.formats import Record
from lora_lightning.data.packing import packed
from lora_lightning.data.read import read_records
from lora_lightning.data.sources import Source

CHUNK = 64
"""So many rows are tokenised in one call."""
PACKED_TOGETHER = 512
"""So many examples are dealt to packed rows together: enough to fill them, few enough to wait for."""
ROWS_BEFORE_JUDGING = 100
"""The share of bad rows says nothing before so many were seen."""


class RowStream(IterableDataset):
    """The examples of one process: of each round of examples, one for every rank and worker, its own.

    Every process reads and tokenises all rows and keeps its share: only so do all ranks get equally many, although
    nobody knows beforehand which rows will be dropped. Rows come in the order of their files, every epoch alike.

    Args:
        sources: To read, in order.
        encoder: Makes examples of records.
        format: As for :func:`~lora_lightning.data.formats.to_record`.
        on_bad_row: ``"drop"`` or ``"error"``.
        held_out: Fingerprints of rows that are for validation, and are passed over.
        rank: Of this process.
        world: The number of ranks.
        capacity: Of packed rows, in tokens, which then take the place of the examples; None does not pack.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        *,
        format: str = "auto",
        on_bad_row: str = "drop",
        held_out: frozenset[str] = frozenset(),
        rank: int = 0,
        world: int = 1,
        capacity: int | None = None,
    ) -> None:
        self.sources = sources
        self.encoder = encoder
        self.format = format
        self.on_bad_row = on_bad_row
        self.held_out = held_out
        self.rank = rank
        self.world = world
        self.capacity = capacity

    def __iter__(self) -> Iterator[Example | list[Example]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shards, shard = workers * self.world, number * self.world + self.rank
        examples: Iterator[Example | list[Example]] = self.examples() if self.capacity is None else self.rows()
        while round_ := list(itertools.islice(examples, shards)):
            if shard < len(round_):
                yield round_[shard]
            elif self.world > 1:
                # Ranks must stay in step, so in the last round some examples come twice.
                yield round_[shard % len(round_)]

    def examples(self) -> Iterator[Example]:
        """All examples, of every rank and worker.

        Raises:
            LoraConfigError: If too many rows are bad.
        """
        tally = Tally()
        records = (record for record in self.records(tally) if record.fingerprint not in self.held_out)
        while chunk := list(itertools.islice(records, CHUNK)):
            yield from self.encoder.encode(chunk, tally, on_bad_row=self.on_bad_row)
            if tally.rows >= ROWS_BEFORE_JUDGING:
                tally.check()

    def rows(self) -> Iterator[list[Example]]:
        """The same, packed."""
        examples = self.examples()
        while together := list(itertools.islice(examples, PACKED_TOGETHER)):
            yield from packed(together, self.capacity or self.encoder.max_length)

    def records(self, tally: Tally) -> Iterator[Record]:
        """The rows in canonical form, those for validation among them."""
        return read_records(self.sources, tally, format=self.format, on_bad_row=self.on_bad_row)
