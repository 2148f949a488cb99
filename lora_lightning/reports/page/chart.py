"""A chart as plain geometry, in per cent of its area: the page draws it at any width, and text keeps its size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lightning.reports.curves import Points, smoothed
from lora_lightning.reports.page.words import figure

_MOST = 300  # points of a line; more are averaged, since a page has no more pixels


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: For the legend.
        tone: Its colour's name in the style sheet: ``trained``, ``validated`` or ``plain``.
        points: Steps and finite values, in order.
        smooth: Whether it is drawn pale, with its running mean above it.
        dots: Whether each point is marked.
    """

    name: str
    tone: str
    points: Points
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Path:
    """A drawn line: the ``d`` of an SVG path in an area of 1000 × 1000, and the classes of its style."""

    d: str
    style: str


@dataclass(frozen=True)
class Mark:
    """A text in the area, at per cents from its left and its bottom."""

    left: float
    bottom: float
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Chart:
    """All that a template needs to draw one.

    Attributes:
        title: What is measured.
        lines: The curves, for the legend.
        grid: The rules across.
        paths: The curves as drawn.
        x: Marks of the steps.
        y: Marks of the values.
        labels: Values written beside points.
        summary: The chart in words, for those who do not see it.
        values: What the pointer shows, as JSON: a list for each curve of name, tone and points, and the limits.
    """

    title: str
    lines: list[Line]
    grid: str
    paths: list[Path]
    x: list[Mark]
    y: list[Mark]
    labels: list[Mark]
    summary: str
    values: str


def chart(title: str, lines: Sequence[Line], *, steps: int | None = None) -> Chart | None:
    """Lay out a chart of curves over the optimizer steps.

    Args:
        title: What is measured.
        lines: The curves; values that are not finite are left out, and so are curves without any other.
        steps: How far the steps go, where the curves end earlier.

    Returns:
        The chart, or None where there is nothing to draw.
    """
    lines = [line for each in lines if (line := _finite(each)).points]
    if not lines:
        return None
    every = [point for line in lines for point in line.points]
    first, last = min(step for step, _ in every), max([step for step, _ in every] + [steps or 0])
    x_ticks = [tick for tick in ticks(first, last, 6, whole=True) if first <= tick <= last]
    y_ticks = ticks(min(value for _, value in every), max(value for _, value in every), 5)
    low, high = y_ticks[0], y_ticks[-1]
    width = (last - first) or 1

    def across(step: float) -> float:
        return 100 * (step - first) / width if last > first else 50.0

    def up(value: float) -> float:
        return 100 * (value - low) / (high - low)

    def drawn(points: Points) -> str:
        return "L".join(f"{10 * across(step):.1f} {1000 - 10 * up(value):.1f}" for step, value in points)

    paths = []
    for line in lines:
        points = thinned(line.points)
        paths.append(Path(f"M{drawn(points)}", f"line {line.tone}{' pale' if line.smooth else ''}"))
        if line.smooth:
            steady = smoothed([value for _, value in line.points])
            mean = thinned([(step, value) for (step, _), value in zip(line.points, steady, strict=True)])
            paths.append(Path(f"M{drawn(mean)}", f"line {line.tone}"))
        if line.dots:
            paths += [Path(f"M{drawn([point])}h0", f"dot {line.tone}") for point in points]
    return Chart(
        title=title,
        lines=lines,
        grid="".join(f"M0 {1000 - 10 * up(tick):.1f}H1000" for tick in y_ticks),
        paths=paths,
        x=[Mark(across(tick), 0.0, f"{tick:,.0f}") for tick in x_ticks],
        y=[Mark(0.0, up(tick), text) for tick, text in zip(y_ticks, written(y_ticks), strict=True)],
        labels=[
            Mark(across(step), up(value), figure(value), line.tone)
            for line in lines
            if line.dots
            for step, value in dict.fromkeys([line.points[0], line.points[-1]])
        ],
        summary="; ".join(_told(line) for line in lines),
        values=json.dumps(
            {
                "x": [first, last],
                "y": [low, high],
                "lines": [[line.name, line.tone, _rounded(thinned(line.points))] for line in lines],
            },
            separators=(",", ":"),
        ),
    )


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers that embrace a range.

    >>> ticks(0.3, 4.1, 5)
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    >>> ticks(2, 2, 5)[0] < 2 < ticks(2, 2, 5)[-1]
    True
    """
    from matplotlib.ticker import MaxNLocator

    if low == high:
        spare = abs(low) * 0.1 or 1.0
        low, high = (low - spare, high + spare) if not whole else (low, high + 1)
    found = MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    # Sums of a step such as 0.1 carry its rounding; only so many digits are meant.
    digits = max(0, 2 - math.floor(math.log10(found[1] - found[0])))
    return [round(float(tick), digits) for tick in found]


def written(values: Sequence[float]) -> list[str]:
    """Equally spaced numbers with as many digits as tell them apart, and none more.

    >>> [written(each) for each in ([0, 1, 2], [0, 0.5], [0, 0.25], [0, 2e-5], [0, 5000])]
    [['0', '1', '2'], ['0.0', '0.5'], ['0.00', '0.25'], ['0', '2e-5'], ['0', '5,000']]
    """
    step, top = values[1] - values[0], max(map(abs, values))
    if top < 1e-2:
        digits = next(digits for digits in range(1, 18) if all(_says(f"{each:.{digits}g}", each) for each in values))
        return ["0" if value == 0 else re.sub(r"e-0*", "e-", f"{value:.{digits}g}") for value in values]
    digits = next(digits for digits in range(20) if _says(f"{step:.{digits}f}", step))
    return [f"{value:,.{digits}f}" for value in values]


def thinned(points: Points, most: int = _MOST) -> Points:
    """At most so many points: means of as many that follow each other; the first and the last stay what they are.

    >>> thinned([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0), (5, 9.0), (6, 4.0)], 4)
    [(1, 1.0), (2, 4.0), (4, 8.0), (6, 4.0)]
    """
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    size = math.ceil(len(inner) / (most - 2))
    groups = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(group[0][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def _finite(line: Line) -> Line:
    points = [(step, value) for step, value in line.points if math.isfinite(value)]
    return Line(line.name, line.tone, points, line.smooth, line.dots)


def _told(line: Line) -> str:
    (first, begun), (last, ended) = line.points[0], line.points[-1]
    if first == last:
        return f"{line.name} {figure(begun)} at step {first}"
    return f"{line.name} from {figure(begun)} at step {first} to {figure(ended)} at step {last}"


def _rounded(points: Points) -> list[list[float]]:
    return [[step, float(f"{value:.5g}")] for step, value in points]


def _says(text: str, value: float) -> bool:
    return math.isclose(float(text), value, rel_tol=1e-6)
