"""The picture of all adapted layers: a line for each kind, a column for each block."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_lightning.reports.insight.places import places_of
from lora_lightning.reports.insight.rows import InsightRow

_PANELS: dict[str, Callable[[InsightRow], float | None]] = {
    "effective rank, as a share of the rank": lambda row: (
        None if row.effective_rank is None else row.effective_rank / (row.rank or row.r)
    ),
    "‖ΔW‖ / ‖W‖": lambda row: row.relative_norm,
}


def insight_picture(rows: Sequence[InsightRow], png: str | os.PathLike[str]) -> Path:
    """Draw how much of its rank each layer uses, and how far the adapter moves it.

    Layers without an adapter are hatched; experts of one block are one cell, which shows their mean.

    Args:
        rows: Of one step.
        png: Where to put the picture.
    """
    # The object interface: pyplot would keep the figure and might look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = places_of([row.layer for row in rows])
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    blocks = sorted({place.block for place in places.values()}, key=lambda block: -1 if block is None else block)
    width = 3.2 + min(max(0.24 * len(blocks), 2.5), 12.0)
    figure = Figure(figsize=(width, 2 * (0.9 + 0.24 * len(kinds))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Adapters after {max(row.step for row in rows)} steps", fontsize=10)
    for axes, (title, value) in zip(figure.subplots(len(_PANELS), 1), _PANELS.items(), strict=True):
        cells: dict[tuple[int, int], list[float]] = defaultdict(list)
        for row in rows:
            if (found := value(row)) is not None:
                place = places[row.layer]
                cells[kinds.index(place.kind), blocks.index(place.block)].append(found)
        table = [
            [fmean(cells[line, column]) if (line, column) in cells else float("nan") for column in range(len(blocks))]
            for line in range(len(kinds))
        ]
        _heatmap(figure, axes, table, title, top=1.0 if "share" in title else None)
        _label(axes, kinds, blocks)
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
    return png


def pixels(png: Path) -> Any:
    """A picture as an array ``(height, width, 3)`` of numbers between 0 and 1."""
    from matplotlib.image import imread

    return imread(png)[..., :3]


def _heatmap(figure: Any, axes: Any, table: list[list[float]], title: str, top: float | None) -> None:
    axes.set_facecolor("#f2f2f2")
    axes.patch.set(hatch="////", edgecolor="#cccccc")
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _label(axes: Any, kinds: Sequence[str], blocks: Sequence[int | None]) -> None:
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    step = -(-len(blocks) // 32)
    axes.set_xticks(
        range(0, len(blocks), step), ["–" if block is None else str(block) for block in blocks[::step]], fontsize=7
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
