"""What the layers do with their adapters, as grids: a row for each kind of layer, a column for each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lora_lightning.reports.insight.places import places_of
from lora_lightning.reports.insight.rows import InsightRow, latest


@dataclass(frozen=True)
class Cell:
    """A layer, or the experts of a block: the value in words, and its shade from 0 to 1."""

    text: str
    shade: float


@dataclass(frozen=True)
class Heatmap:
    """A grid as it is drawn.

    Attributes:
        meaning: What a cell shows.
        low: What the palest shade means, in words.
        high: What the darkest means.
        mean: Of all layers, in words.
        blocks: The headings of the columns.
        rows: A heading and cells; None where there is no such layer, or none with an adapter.
    """

    meaning: str
    low: str
    high: str
    mean: str
    blocks: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def heatmaps(rows: Sequence[InsightRow]) -> list[Heatmap]:
    """How much of its rank each layer uses and how far the adapter moves it, at the last time that was looked.

    Args:
        rows: Of ``insight.csv``.
    """
    drawn = [
        _heatmap(
            rows,
            "Effective rank, as a share of the rank",
            _share_of_rank,
            lambda value: f"{value:.0%}".replace("%", " %"),
            1.0,
        ),
        _heatmap(rows, "How far the weight is moved, ‖ΔW‖ / ‖W‖", lambda row: row.relative_norm, "{:.2g}".format),
    ]
    return [each for each in drawn if each is not None]


def _share_of_rank(row: InsightRow) -> float | None:
    return None if row.effective_rank is None else row.effective_rank / (row.rank or row.r)


def _heatmap(
    rows: Sequence[InsightRow],
    meaning: str,
    value: Callable[[InsightRow], float | None],
    shown: Callable[[float], str],
    top: float | None = None,
) -> Heatmap | None:
    measured = [(row, found) for row in latest(rows) if (found := value(row)) is not None]
    if not measured:
        return None
    places = places_of([row.layer for row, _ in measured])
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    blocks = sorted({place.block for place in places.values()}, key=lambda block: (block is None, block or 0))
    values: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for row, found in measured:
        values[places[row.layer]].append(found)
    high = top or max(found for _, found in measured) or 1.0

    def cell(kind: str, block: int | None) -> Cell | None:
        if (kind, block) not in values:
            return None
        found = fmean(values[kind, block])
        where = kind if block is None else f"{kind} in block {block}"
        return Cell(f"{where}: {shown(found)}", max(0.0, min(1.0, found / high)))

    return Heatmap(
        meaning=meaning,
        low="0",
        high=shown(high),
        mean=shown(fmean(found for _, found in measured)),
        blocks=["–" if block is None else str(block) for block in blocks],
        rows=[(kind, [cell(kind, block) for block in blocks]) for kind in kinds],
    )
