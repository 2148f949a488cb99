"""All settings and the metric of each job in one picture: parallel coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.sweeps.report.collect import Row, Sweep
from lora_lightning.sweeps.report.scales import Scale, cut, limits, scale_of
from lora_lightning.sweeps.report.sheet import BEST, new_sheet, shades
from lora_lightning.sweeps.report.values import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPREAD = 0.05  # of an axis' height: lines through the same values lie side by side, the better above


def parallel_coordinates(sweep: Sweep) -> Figure | None:
    """Draw each finished job as a line over one axis a setting and one for the metric; the better, the darker.

    Returns:
        The picture, or None for less than two settings with several values, or less than two jobs.
    """
    rows = [row for row in sweep.ranked if row.metric is not None]
    scales = {key: scale_of(key, (row.settings.get(key, "") for row in rows)) for key in sweep.setting_keys}
    scales = {key: scale for key, scale in scales.items() if len(scale.values) > 1}
    if len(rows) < 2 or len(scales) < 2:
        return None
    low, high = limits([row.metric or 0.0 for row in rows], sweep.mode)
    places = {key: _Heights(scale) for key, scale in scales.items()}
    figure, axes = new_sheet(max(7.2, 2.0 * (len(scales) + 1)), 4.6)
    _draw_axes(axes, sweep, places, low, high)
    palette = shades(len(rows))
    for index in reversed(range(len(rows))):  # the best on top
        row = rows[index]
        aside = _SPREAD * (0.5 - index / (len(rows) - 1))
        heights = [places[key].of(row, key) + aside for key in scales]
        heights.append(min(1.0, max(0.0, ((row.metric or 0.0) - low) / (high - low))))
        label = f"best: job {row.number}, {shown(row.metric)} (darker is better)"
        strong = {"color": BEST, "linewidth": 2.5, "label": label}
        axes.plot(heights, **(strong if index == 0 else {"color": palette[index], "linewidth": 1.0, "alpha": 0.75}))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), frameon=False, fontsize=8)
    return figure


class _Heights:
    """Where values lie on an upright axis from 0 to 1."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._low, self._high = scale.place(scale.values[0]), scale.place(scale.values[-1])

    def at(self, place: float) -> float:
        return (place - self._low) / (self._high - self._low)

    def of(self, row: Row, key: str) -> float:
        return self.at(self.scale.place(row.settings.get(key, "")))


def _draw_axes(axes: Axes, sweep: Sweep, places: dict[str, _Heights], low: float, high: float) -> None:
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    names = [cut(key, 28) for key in places]
    axes.set_xticks(range(len(names) + 1), [*names, str(sweep.metric)])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.35, len(names) + 0.3)
    axes.set_ylim(-0.06, 1.06)
    for at, heights in enumerate(places.values()):
        _upright(axes, at, [(heights.at(place), text) for place, text in heights.scale.ticks])
    steps = [low + (high - low) * part / 4 for part in range(5)]
    _upright(axes, len(names), [((value - low) / (high - low), shown(float(f"{value:.4g}"))) for value in steps])


def _upright(axes: Axes, at: int, ticks: list[tuple[float, str]]) -> None:
    axes.axvline(at, color="#5f6368", linewidth=0.8)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for height, text in ticks:
        axes.text(at - 0.03, height, text, ha="right", va="center", fontsize=8, zorder=6, bbox=box)
