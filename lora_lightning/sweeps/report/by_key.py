"""The metric against one setting, the other settings as lines or colours."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from lora_lightning.sweeps.report.collect import Row, Sweep
from lora_lightning.sweeps.report.scales import Scale, cut, limits, scale_of
from lora_lightning.sweeps.report.sheet import BEST, GREY, colours, legend_beside, mark_ticks, new_sheet
from lora_lightning.sweeps.report.values import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: Any = ("-", "--", ":", "-.")
_COLOURS = 8  # more cannot be told apart
_MARKERS = ("o", "s", "D", "^")


def by_key(sweep: Sweep, key: str) -> Figure | None:
    """Draw the metric of the finished jobs against one setting; of several seeds, mean and standard deviation.

    Jobs that agree in all other settings are joined by a line. One that agrees with no other, as in a random search, is
    a point.

    Returns:
        The picture, or None where the setting has only one value.
    """
    rows = [row for row in sweep.ranked if row.metric is not None and key in row.settings]
    if len({_text(row, key) for row in rows}) < 2:
        return None
    across = scale_of(key, (row.settings[key] for row in rows))
    others = _others(sweep, key, rows)
    coloured = next((each for each in others if len(others[each].values) <= _COLOURS), next(iter(others), None))
    styled = next((each for each in others if each != coloured and len(others[each].values) <= len(_STYLES)), None)
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(_text(row, other) for other in others), []).append(row)

    figure, axes = new_sheet(9.0 if coloured else 7.2)
    for line in lines.values():
        colour = colours(others[coloured])[_index(others[coloured], line[0], coloured)] if coloured else "#4878b6"
        style = _index(others[styled], line[0], styled) if styled else 0
        _draw_line(axes, across, key, line, color=colour, marker=_MARKERS[style], linestyle=_STYLES[style])
    _ring_best(axes, sweep, across, key)
    _show_range(axes, sweep, across, key, rows)
    mark_ticks(axes, across)
    axes.set_xlabel(key)
    axes.set_ylabel(str(sweep.metric))
    _explain(figure, axes, sweep, others, coloured, styled)
    return figure


def _others(sweep: Sweep, key: str, rows: list[Row]) -> dict[str, Scale]:
    """The other settings that differ among the jobs."""
    scales = {
        other: scale_of(other, (row.settings.get(other, "") for row in rows))
        for other in sweep.setting_keys
        if other != key
    }
    return {other: scale for other, scale in scales.items() if len(scale.values) > 1}


def _text(row: Row, key: str) -> str:
    return shown(row.settings.get(key, ""))


def _index(scale: Scale, row: Row, key: str) -> int:
    return [shown(value) for value in scale.values].index(_text(row, key))


def _draw_line(axes: Axes, across: Scale, key: str, rows: list[Row], **style: Any) -> None:
    """Jobs that differ in one setting and in their seeds."""
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(across.place(row.settings[key]), []).append(row.metric or 0.0)
    places = sorted(at)
    means = [statistics.fmean(at[place]) for place in places]
    deviations = [statistics.stdev(at[place]) if len(at[place]) > 1 else 0.0 for place in places]
    axes.plot(places, means, markersize=5, linewidth=1.5, **style)
    if any(deviations):
        axes.errorbar(
            places, means, deviations, fmt="none", ecolor=style["color"], elinewidth=1.2, capsize=3, alpha=0.8
        )
        each = [(place, value) for place in places for value in at[place]]
        axes.plot(*zip(*each, strict=True), ".", color=style["color"], alpha=0.4, markersize=5)


def _ring_best(axes: Axes, sweep: Sweep, across: Scale, key: str) -> None:
    best = sweep.best
    if best is None or best.metric is None or key not in best.settings:
        return
    axes.plot(
        *(across.place(best.settings[key]), best.metric),
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=BEST,
        markeredgewidth=2,
        linestyle="",
        zorder=5,
        label=f"best: job {best.number}",
    )


def _show_range(axes: Axes, sweep: Sweep, across: Scale, key: str, rows: list[Row]) -> None:
    """Cut the axis where a few jobs are far off, and say so."""
    low, high = limits([row.metric or 0.0 for row in rows], sweep.mode)
    axes.set_ylim(low, high)
    beyond = [row for row in rows if not low <= (row.metric or 0.0) <= high]
    if not beyond:
        return
    edge, marker = (low, "v") if sweep.mode == "max" else (high, "^")
    places = [across.place(row.settings[key]) for row in beyond]
    axes.plot(places, [edge] * len(places), marker, color=GREY, markersize=8, clip_on=False, zorder=6)
    worst = shown(beyond[-1].metric)
    text = f"{len(beyond)} job{'s' * (len(beyond) > 1)} beyond, as far as {worst}"
    axes.set_title(text, fontsize=8, color="#5f6368", loc="right")


def _explain(
    figure: Figure, axes: Axes, sweep: Sweep, others: dict[str, Scale], coloured: str | None, styled: str | None
) -> None:
    """Say what colours and strokes mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    handles, texts = axes.get_legend_handles_labels()
    if coloured is not None and len(others[coloured].values) <= _COLOURS:
        scale, palette = others[coloured], colours(others[coloured])
        handles += [Line2D([], [], color=palette[index], linewidth=2.5) for index in range(len(scale.values))]
        texts += [f"{sweep.short[coloured]}={cut(shown(value), 22)}" for value in scale.values]
    elif coloured is not None:
        scale = others[coloured]
        places, labels = zip(*scale.ticks, strict=True)
        low, high = scale.place(scale.values[0]), scale.place(scale.values[-1])
        bar = figure.colorbar(ScalarMappable(Normalize(low, high), "viridis"), ax=axes, label=coloured, ticks=places)
        bar.ax.set_yticklabels(labels, fontsize=8)
        bar.ax.minorticks_off()
    if styled is not None:
        scale = others[styled]
        handles += [
            Line2D([], [], color=GREY, linestyle=_STYLES[index], marker=_MARKERS[index], markersize=4)
            for index in range(len(scale.values))
        ]
        texts += [f"{sweep.short[styled]}={cut(shown(value), 22)}" for value in scale.values]
    legend_beside(figure, handles, texts)
