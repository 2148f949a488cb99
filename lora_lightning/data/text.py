"""The user's own rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from lora_lightning.data.chats import ChatDataModule, ChatOptions
from lora_lightning.data.encode import Tally
from lora_lightning.data.formats import FORMATS, Record
from lora_lightning.data.loaders import Rows
from lora_lightning.data.module import Loaded
from lora_lightning.data.read import read_records
from lora_lightning.data.samplers import draw, split_rows
from lora_lightning.data.sources import Source, find_sources
from lora_lightning.data.stream import RowStream
from lora_lightning.errors import LoraConfigError, did_you_mean

STREAM_HEAD = 2000
"""Of a stream, so many rows are read before training: to be judged, shown, and partly held out."""


class TextData(ChatDataModule):
    """JSONL, JSON, CSV or Parquet files, a folder of them, or a data set of the Hugging Face Hub.

    Rows are prompt/completion, alpaca, sharegpt, messages or plain text, told apart by their columns.

    Args:
        path: A file, a folder, or the name of a Hub data set. In a folder, files whose names start with ``train`` and
            ``validation`` are used as such.
        val_path: Rows for validation; None takes those that ``path`` has apart, or splits some off.
        val_split: The share of rows to split off for validation where there are none apart; 0 for none.
        format: ``"auto"``, or one of messages, sharegpt, alpaca, prompt_completion, text.
        on_bad_row: ``"drop"`` drops and shows them, and is an error only where they are more than 5 %; ``"error"``
            stops at the first.
        streaming: Read and tokenise while training, in the order of the files.
        **options: Those of :class:`~lora_lightning.data.module.ChatDataModule`.

    Raises:
        LoraConfigError: If an option makes no sense.
    """

    def __init__(
        self,
        path: str,
        *,
        val_path: str | None = None,
        val_split: float = 0.05,
        format: str = "auto",
        on_bad_row: str = "drop",
        streaming: bool = False,
        **options: Unpack[ChatOptions],
    ) -> None:
        super().__init__(**options)
        wrong = [
            f"{name}={given!r} is none of {', '.join(known)}{did_you_mean(str(given), known)}"
            for name, given, known in (
                ("format", format, ("auto", *FORMATS)),
                ("on_bad_row", on_bad_row, ("drop", "error")),
            )
            if given not in known
        ]
        if streaming and options.get("cache"):
            wrong.append("streaming=true reads rows while training, so cache must be false")
        if not 0 <= val_split < 1:
            wrong.append(f"val_split must be at least 0 and less than 1, got {val_split!r}")
        if wrong:
            raise LoraConfigError("; ".join(wrong) + ".")
        self.path = str(path)
        self.val_path = val_path
        self.val_split = val_split
        self.format = format
        self.on_bad_row = on_bad_row
        self.streaming = streaming

    def prepare_data(self) -> None:
        """Looks for the data, and downloads a Hub data set once a machine."""
        for source in itertools.chain(*self._sources()) if not self.streaming else []:
            next(iter(source), None)

    def records(self) -> tuple[list[Record], list[Record], Tally, Tally]:
        """Reads all rows, and splits some off where none are apart."""
        sources, val_sources = self._sources()
        train, val = Tally(), Tally()
        records = self._read(sources, train)
        if val_sources:
            return records, self._read(val_sources, val), train, val
        count = min(max(1, round(len(records) * self.val_split)), len(records) - 1) if self.val_split else 0
        ours, theirs = split_rows([record.fingerprint for record in records], count, self.seed)
        train.rows, val.rows = train.rows - len(theirs), len(theirs)
        return [records[place] for place in ours], [records[place] for place in theirs], train, val

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Loaded:
        """Reads and tokenises the rows, or of a stream its head."""
        if not self.streaming:
            return super().load(tokenizer)
        encoder, notes = self.encoder(tokenizer)
        sources, val_sources = self._sources()
        capacity = self.max_length if self.packing else None
        stream = RowStream(sources, encoder, format=self.format, on_bad_row=self.on_bad_row, capacity=capacity)
        head, val = Tally(), Tally()
        train_records = list(itertools.islice(stream.records(head), STREAM_HEAD))
        head.check()
        if val_sources:
            val_records = self._read(val_sources, val)
        else:
            val_records = [record for record in train_records if draw(record.fingerprint, self.seed) < self.val_split]
            stream.held_out = frozenset(record.fingerprint for record in val_records)
            train_records = [record for record in train_records if record.fingerprint not in stream.held_out]
            head.rows, val.rows = head.rows - len(val_records), len(val_records)
        examples = self.encode(encoder, train_records, head, "training")
        return Loaded(
            train=stream,
            validation=Rows(self.encode(encoder, val_records, val, "validation") if val_records else []),
            shown=examples[0],
            tallies={f"train (first {head.rows:,} rows of a stream)": head, "validation": val},
            notes=notes + self.remarks(encoder, train_records, val_records),
            prompts=self.prompts(encoder, val_records or train_records),
        )

    def content(self) -> object:
        """The digests of the files, by name; of Hub data sets their own fingerprints."""
        return [[str(source), source.digest()] for sources in self._sources() for source in sources]

    def _sources(self) -> tuple[Sequence[Source], Sequence[Source]]:
        train, val = find_sources(self.path, streaming=self.streaming)
        return train, (find_sources(self.val_path)[0] if self.val_path else val)

    def _read(self, sources: Sequence[Source], tally: Tally) -> list[Record]:
        records = list(read_records(sources, tally, format=self.format, on_bad_row=self.on_bad_row))
        tally.check()
        return records
