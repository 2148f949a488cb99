"""Where rows come from: JSONL, JSON, CSV and Parquet files, folders of them, and Hub data sets.

A row carries its file and line with it, so that whatever is found wrong with it later can be shown at its place.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_lightning.data.checksum import pieces, sha256
from lora_lightning.errors import LoraConfigError, did_you_mean


@dataclass(frozen=True)
class Row:
    """One row as it stands in its source."""

    where: str
    """File and line, for messages: ``chats.jsonl:17``."""
    fields: dict[str, object] = field(default_factory=dict)
    problem: str = ""
    """Why the row could not be read; ``fields`` is empty then."""


@dataclass(frozen=True)
class FileSource:
    """The rows of one file; iterating reads it from the start, one row at a time.

    Raises:
        LoraConfigError: While iterating, if the file cannot be read as what its name says, or is not UTF-8.
    """

    path: Path

    def __iter__(self) -> Iterator[Row]:
        return READERS[self.path.suffix.lower()](self.path)

    def digest(self) -> str:
        """The SHA-256 of the file's content."""
        return sha256(pieces(self.path))

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubSource:
    """The rows of one split of a data set on the Hugging Face Hub."""

    name: str
    split: str
    streaming: bool = False

    def __iter__(self) -> Iterator[Row]:
        import datasets  # slow to import, and not needed for files

        rows = datasets.load_dataset(self.name, split=self.split, streaming=self.streaming)
        return (Row(f"{self} row {number}", dict(row)) for number, row in enumerate(rows, 1))

    def digest(self) -> str:
        """What ``datasets`` itself knows the rows by."""
        import datasets

        return str(datasets.load_dataset(self.name, split=self.split)._fingerprint)

    def __str__(self) -> str:
        return f"{self.name}[{self.split}]"


Source = FileSource | HubSource


def find_sources(path: str, *, streaming: bool = False) -> tuple[list[Source], list[Source]]:
    """The sources behind a path, apart for training and for validation.

    Args:
        path: A file, a folder (searched to its depths; what lies under ``train*`` and ``validation*`` names is told
            apart), or the name of a Hub data set where nothing of that name lies on disk.
        streaming: Let a Hub data set come row by row instead of downloading it first.

    Raises:
        LoraConfigError: If there is nothing to read.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [_file(place)], []
    if place.is_dir():
        return _folder(place)
    if place.suffix.lower() in READERS or path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        there = [other.name for other in place.parent.iterdir()] if place.parent.is_dir() else []
        raise LoraConfigError(f"There is no data file {path!r}{did_you_mean(place.name, there)}.")
    return _hub(path, streaming)


def _file(path: Path) -> FileSource:
    if path.suffix.lower() not in READERS:
        raise LoraConfigError(f"{path} is none of the files that can be read: {', '.join(READERS)}.")
    return FileSource(path)


def _folder(folder: Path) -> tuple[list[Source], list[Source]]:
    kinds: dict[str, list[Source]] = {"train": [], "validation": [], "test": [], "": []}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.is_file() and path.suffix.lower() in READERS and not any(part[0] == "." for part in below.parts):
            kinds[next(filter(None, map(_kind, below.parts)), "")].append(FileSource(path))
    train = kinds["train"] or kinds[""]
    if not train:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise LoraConfigError(
            f"The folder {folder} holds no training data: files that end in {', '.join(READERS)} are looked for "
            f"(not under names that start with validation or test), found: {found}."
        )
    return train, kinds["validation"]


def _kind(part: str) -> str:
    for kind, starts in {"train": ("train",), "validation": ("val", "dev"), "test": ("test",)}.items():
        if part.lower().startswith(starts):
            return kind
    return ""


def _hub(name: str, streaming: bool) -> tuple[list[Source], list[Source]]:
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name)
    except Exception as error:  # the Hub's errors are of many kinds, and all mean the same to the reader
        raise LoraConfigError(
            f"{name!r} is neither a file nor a folder here, and could not be loaded as a Hub data set: {error}"
        ) from error
    if "train" not in splits:
        raise LoraConfigError(f"The Hub data set {name!r} has no split 'train'; it has {', '.join(splits)}.")
    validation = next((split for split in splits if _kind(split) == "validation"), None)
    return (
        [HubSource(name, "train", streaming)],
        [HubSource(name, validation, streaming)] if validation else [],
    )


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise LoraConfigError(
                    f"{path} is not UTF-8: byte {offset + error.start} (line {number}) is "
                    f"0x{raw[error.start]:02x}. Save it as UTF-8, for instance with "
                    f"`iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}`."
                ) from error
            offset += len(raw)


def _row(where: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, problem=f"an object with named fields is needed, got {type(value).__name__}")


def _read_json(path: Path) -> Iterator[Row]:
    blank = True
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if blank and line.lstrip().startswith("["):
            yield from _read_json_list(path)
            return
        blank = False
        try:
            yield _row(f"{path}:{number}", json.loads(line))
        except json.JSONDecodeError as error:
            yield Row(f"{path}:{number}", problem=f"not valid JSON ({error.msg} at column {error.colno})")


def _read_json_list(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        while text[position : position + 1] in {" ", "\t", "\r", "\n", ","}:
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise LoraConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from error
        yield _row(f"{path}:{line}", value)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 26))  # stories are longer than the 128 KiB it allows
    reader = csv.reader(_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for values in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(values) == len(header):
                yield Row(where, dict(zip(header, values, strict=True)))
            elif values:
                yield Row(where, problem=f"{len(values)} cells, the header has {len(header)}")
    except csv.Error as error:
        raise LoraConfigError(f"{path}:{reader.line_num}: not valid CSV ({error}).") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", fields)
    except pyarrow.ArrowException as error:
        raise LoraConfigError(f"{path} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""What reads a file, by the ending of its name."""
