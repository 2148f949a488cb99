"""The curves of a run, from the metrics that it has left."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

Points = list[tuple[int, float]]  # optimizer steps done, and the value then


def parts_of(metrics_csv: Path) -> list[Path]:
    """The files of a run that was resumed, in its order: ``metrics-1.csv``, ``metrics-2.csv`` …, ``metrics.csv``."""
    names = re.compile(rf"{re.escape(metrics_csv.stem)}-(\d+){re.escape(metrics_csv.suffix)}")
    beside = metrics_csv.parent.iterdir() if metrics_csv.parent.is_dir() else ()
    numbered = [(int(found[1]), path) for path in beside if (found := names.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)] + [metrics_csv] * metrics_csv.is_file()


def joined(files: Sequence[Path], *columns: str) -> list[Points]:
    """One curve of all parts of a run for each column.

    What an earlier part did beyond the step that a later one began with is dropped: it was done again.

    Args:
        files: What Lightning's CSVLogger wrote, oldest first.
        *columns: Which columns.
    """
    curves: list[Points] = [[] for _ in columns]
    begun = math.inf
    for file in reversed(files):
        parts = series(file, *columns)
        curves = [
            [point for point in part if point[0] < begun] + curve for part, curve in zip(parts, curves, strict=True)
        ]
        begun = min([begun, *(step for part in parts for step, _ in part)])
    return curves


def series(metrics_csv: Path, *columns: str) -> list[Points]:
    """The values of each column over the optimizer steps."""
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Lightning numbers steps from 0: what stands at step n was measured after n + 1 of them.
    return [[(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)] for name in columns]


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of a tenth of the run, cut at the ends."""
    reach = max(1, len(values) // 20)
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]
