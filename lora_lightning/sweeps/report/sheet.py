"""What the pictures of a sweep have in common: paper, axes and colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lora_lightning.sweeps.report.scales import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST, GREY = "#d1495b", "#9aa0a6"
_APART = ("#4878b6", "#e08e45", "#4f9d69", "#8e5ea2", "#b5525c", "#7a7a7a", "#4fb3bf", "#c2a83e")


def new_sheet(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    # The object interface: pyplot would keep the figure and might look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def mark_ticks(axes: Axes, scale: Scale) -> None:
    """Write a setting's values along the horizontal axis, slanted where they would touch."""
    places, texts = zip(*scale.ticks, strict=True)
    long = sum(map(len, texts)) > 60
    axes.set_xticks(places, texts, rotation=30 if long else 0, ha="right" if long else "center")
    axes.minorticks_off()
    spread = (max(map(scale.place, scale.values)) - min(map(scale.place, scale.values))) or 1.0
    low = min(map(scale.place, scale.values))
    axes.set_xlim(low - 0.06 * spread, low + 1.06 * spread)


def colours(scale: Scale) -> dict[Any, Any]:
    """A colour for each value of a setting: shades where values have an order, else colours far apart."""
    if scale.kind == "words" and len(scale.values) <= len(_APART):
        return dict(zip(range(len(scale.values)), _APART, strict=False))
    return dict(enumerate(shades(len(scale.values))))


def shades(count: int) -> list[Any]:
    """So many colours in an order, the first one the strongest."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def legend_beside(figure: Figure, handles: Sequence[Any], texts: Iterable[str], title: str | None = None) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    figure.legend(
        handles, list(texts), title=title, loc="outside right upper", frameon=False, fontsize=8, title_fontsize=8
    )
