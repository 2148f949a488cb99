"""How the adapted layers use their rank, as a grid: a row for each kind of module, a column for each block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What is shown of a layer: the first of these columns that the file has, and what it means.
_VALUES = {
    "rank_used": "share of the rank in use",
    "used": "share of the rank in use",
    "effective_rank": "effective rank of the update",
    "stable_rank": "stable rank of the update",
}
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_OUTSIDE = -1  # the column of layers that belong to no block


@dataclass(frozen=True)
class Cell:
    """A layer: its name and value in words, and its shade from 0 to 1."""

    text: str
    shade: float


@dataclass(frozen=True)
class Heatmap:
    """The grid as it is drawn.

    Attributes:
        meaning: What a cell shows.
        step: After how many steps.
        low: The least value, in words.
        high: The greatest.
        blocks: The headings of the columns.
        rows: A heading and cells; None where there is no such layer.
    """

    meaning: str
    step: int
    low: str
    high: str
    blocks: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def heatmap(rows: Sequence[Mapping[str, str]]) -> Heatmap | None:
    """The latest state of all layers.

    Args:
        rows: Of ``insight.csv``: ``step``, ``layer`` and values.

    Returns:
        The grid, or None where the rows have nothing of the kind.
    """
    column = next((name for name in _VALUES if any(row.get(name) for row in rows)), None)
    measured = [row for row in rows if column and row.get("layer") and _finite(row.get(column)) is not None]
    if column is None or not measured:
        return None
    step = max(int(float(row.get("step") or 0)) for row in measured)
    values = {row["layer"]: float(row[column]) for row in measured if int(float(row.get("step") or 0)) == step}
    places = {name: _place(name) for name in values}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()}, key=lambda block: (block == _OUTSIDE, block))
    # Shares stand on their whole scale; ranks on that of this run.
    share = _VALUES[column].startswith("share")
    low, high = (0.0, 1.0) if share else (0.0, max(values.values()))
    by_place = {place: name for name, place in places.items()}

    def shown(value: float) -> str:
        return f"{value:.0%}".replace("%", " %") if share else f"{value:.1f}"

    def cell(kind: str, block: int) -> Cell | None:
        name = by_place.get((kind, block))
        if name is None:
            return None
        value = values[name]
        return Cell(f"{name}: {shown(value)}", max(0.0, min(1.0, (value - low) / ((high - low) or 1))))

    return Heatmap(
        meaning=_VALUES[column],
        step=step,
        low=shown(low),
        high=shown(high),
        blocks=["" if block == _OUTSIDE else str(block) for block in blocks],
        rows=[(_short(kind, kinds), [cell(kind, block) for block in blocks]) for kind in kinds],
    )


def _place(name: str) -> tuple[str, int]:
    """The row and the column of a layer.

    >>> _place("model.layers.3.self_attn.q_proj"), _place("score")
    (('model.layers.*.self_attn.q_proj', 3), ('score', -1))
    """
    found = _BLOCK.search(name)
    if found is None:
        return name, _OUTSIDE
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}", int(found[1])


def _short(kind: str, kinds: Sequence[str]) -> str:
    """The end of a name that no other has."""
    parts = kind.split(".")
    for length in range(1, len(parts) + 1):
        end = ".".join(parts[-length:])
        if sum(each == end or each.endswith(f".{end}") for each in kinds) == 1:
            return end
    return kind


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
