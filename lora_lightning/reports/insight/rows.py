"""``insight.csv``: a row for each layer and each time that it was looked at."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lora_lightning.errors import AdapterError


@dataclass(frozen=True)
class InsightRow:
    """What was seen of one layer. None is what is not known, or has no meaning for a layer without an adapter.

    Attributes:
        step: Optimizer steps done.
        layer: Name below the adapted model, as the config's patterns have it.
        r: The rank that the config gave it; 0 for a layer that could have an adapter and has none.
        rank: The rank that its update could have: r, or r over the groups of a convolution, or 2r where the adapter
            began with a part of the base's weight.
        effective_rank: Of ``ΔW``: ``exp`` of the entropy of its singular values (Roy and Vetterli 2007).
        stable_rank: ``‖ΔW‖_F² / ‖ΔW‖₂²``.
        rank_used: The share of ``rank`` that holds 99 % of ``‖ΔW‖_F²``.
        rank_95: How many directions hold 95 % of ``‖ΔW‖_F²``.
        lesser_half: The share of ``‖ΔW‖_F²`` that half of ``rank`` would lose; None where ``rank`` is 1.
        relative_norm: ``‖ΔW‖_F / ‖W‖_F``.
        grad_norm_A: Norm of the gradient of ``A`` in the step before, not clipped.
        grad_norm_B: The same of ``B``.
        parameters: Of the base's weight.
    """

    step: int
    layer: str
    r: int
    rank: int | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    rank_used: float | None = None
    rank_95: float | None = None
    relative_norm: float | None = None
    grad_norm_A: float | None = None
    grad_norm_B: float | None = None
    parameters: int | None = None
    lesser_half: float | None = None


COLUMNS = tuple(field.name for field in fields(InsightRow))
_WHOLE = ("step", "r", "rank", "parameters")


def read_rows(path: str | os.PathLike[str]) -> list[InsightRow]:
    """All rows of an ``insight.csv``, in its order; none where there is no such file.

    Raises:
        AdapterError: If the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"step", "layer", "r"} - set(reader.fieldnames or ()):
            raise AdapterError(f"{path} is no insight.csv: it has no column {', '.join(sorted(missing))}")
        try:
            return [_row(cells) for cells in reader if None not in cells.values()]  # lines that were cut off
        except ValueError as error:
            raise AdapterError(f"{path} cannot be read: {error}") from error


def latest(rows: Sequence[InsightRow]) -> list[InsightRow]:
    """Those of the last time that was looked."""
    last = max((row.step for row in rows), default=None)
    return [row for row in rows if row.step == last]


def append_rows(path: Path, rows: Iterable[InsightRow]) -> None:
    """Add rows to a file, with its heading where it is new, and below a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = _last_byte(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not last:
            writer.writeheader()
        elif last != b"\n":
            file.write("\n")
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def _last_byte(path: Path) -> bytes:
    """Nothing of a file that is empty or not there."""
    if not path.exists() or not (size := path.stat().st_size):
        return b""
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1)


def go_on(path: Path, step: int) -> None:
    """Make a file ready for a run that begins at a step.

    What it says of later steps is dropped, since they are done again; columns that it lacks are added. A run that
    begins at the beginning leaves an earlier run's file beside its own, as ``insight-1.csv``.
    """
    if not path.exists():
        return
    if step == 0:
        number = 1
        while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
        return
    rows = read_rows(path)
    kept = [row for row in rows if row.step <= step]
    if len(kept) < len(rows) or _heading(path) != list(COLUMNS):
        beside = path.with_name(f".{path.name}.tmp")
        beside.unlink(missing_ok=True)
        append_rows(beside, kept)
        beside.replace(path)


def _heading(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _row(cells: dict[str, str]) -> InsightRow:
    values = {name: _value(name, cells.get(name)) for name in COLUMNS}
    return InsightRow(**values)  # type: ignore[arg-type]


def _value(name: str, cell: str | None) -> str | int | float | None:
    if name == "layer":
        return cell or ""
    if not cell:
        return None
    return int(cell) if name in _WHOLE else float(cell)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return "" if value is None else value
