"""Sources to records: every row is counted, and the bad ones are told with their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_lightning.data.encode import Tally
from lora_lightning.data.formats import Record, RowProblem, to_record
from lora_lightning.data.sources import Source
from lora_lightning.errors import LoraConfigError


def read_records(
    sources: Iterable[Source], tally: Tally, *, format: str = "auto", on_bad_row: str = "drop"
) -> Iterator[Record]:
    """The rows of sources in canonical form, one at a time.

    Args:
        sources: Read one after the other.
        tally: Counts rows, formats and bad rows.
        format: As for :func:`~lora_lightning.data.formats.to_record`.
        on_bad_row: ``"drop"`` passes over bad rows; ``"error"`` raises at the first.

    Raises:
        LoraConfigError: If a source is empty.
    """
    for source in sources:
        before = tally.rows
        for row in source:
            tally.rows += 1
            try:
                record, read_as = to_record(row, format)
            except RowProblem as problem:
                tally.drop(row.where, problem, on_bad_row=on_bad_row)
                continue
            tally.formats[read_as] += 1
            yield record
        if tally.rows == before:
            raise LoraConfigError(f"{source} is empty: there are no rows in it.")
