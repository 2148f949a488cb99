"""The pictures of a sweep."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_lightning.reports.curves import Points, joined, parts_of
from lora_lightning.sweeps.report.by_key import by_key
from lora_lightning.sweeps.report.collect import Row, Sweep
from lora_lightning.sweeps.report.importance import importance_bars
from lora_lightning.sweeps.report.parallel import parallel_coordinates
from lora_lightning.sweeps.report.scales import cut, limits
from lora_lightning.sweeps.report.sheet import BEST, GREY, legend_beside, new_sheet, shades

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "plots"
_NAMED = 8  # curves with a colour and a name; more have no place in a legend


def draw_all(sweep: Sweep) -> list[str]:
    """Draw what there is to draw.

    A picture that cannot be drawn is warned of: a report does not fail for its pictures.

    Returns:
        The pictures' paths, as seen from the sweep's folder.
    """
    made = []
    for name, draw in _pictures(sweep):
        path = sweep.folder / FOLDER / f"{name}.png"
        try:
            figure = draw()
            if figure is not None:
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path)
                made.append(sweep.inside(path))
        except Exception as error:  # whatever it is, the tables matter more
            warnings.warn(f"The picture {path} could not be drawn: {error!r}", stacklevel=2)
    return made


def drawn(sweep: Sweep) -> list[str]:
    """The pictures of this sweep that lie in its folder, as seen from there."""
    paths = (sweep.folder / FOLDER / f"{name}.png" for name, _ in _pictures(sweep))
    return [sweep.inside(path) for path in paths if path.is_file()]


def _pictures(sweep: Sweep) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    if sweep.best is not None:
        for key in sweep.setting_keys:
            name = re.sub(r"[^\w.-]+", "_", f"{sweep.metric}_by_{sweep.short[key]}")
            yield name, lambda key=key: by_key(sweep, key)  # type: ignore[misc]  # drawn at once
        yield "parallel", lambda: parallel_coordinates(sweep)
        yield "importance", lambda: importance_bars(sweep)
    yield "val_loss_curves", lambda: validation_curves(sweep)


def validation_curves(sweep: Sweep) -> Figure | None:
    """Draw the validation loss of all jobs over the steps, the best ones in colour; None where none has any."""
    rows = [*sorted(sweep.of_state("finished", "stopped"), key=sweep.rank)]
    rows += sweep.of_state("failed", "interrupted", "unfinished")
    curves = [(row, curve) for row in rows if (curve := _curve(row))]
    if not curves:
        return None
    from matplotlib.ticker import MaxNLocator

    named, others = curves[:_NAMED], curves[_NAMED:]
    figure, axes = new_sheet(10.0)
    for _, curve in others:
        axes.plot(*zip(*curve, strict=True), color=GREY, alpha=0.5, linewidth=0.8, zorder=1)
    best = next((row for row, _ in named if row is sweep.best), None)
    palette = shades(len(named))
    handles = []
    for (row, curve), colour in reversed([*zip(named, palette, strict=True)]):
        style = {"color": BEST, "linewidth": 2.5} if row is best else {"color": colour, "linewidth": 1.4}
        handles += axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, **style)
    handles.reverse()
    texts = [_name(sweep, row) for row, _ in named]
    if others:
        handles += axes.plot([], [], color=GREY, linewidth=0.8)
        texts.append(f"{len(others)} more")
    # What a diverged job rises to is not worth the place; what all begin with is.
    _, top = limits([curve[0][1] for _, curve in curves], "min")
    axes.set_ylim(*limits([top, min(value for _, curve in curves for _, value in curve)], "min"))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss")
    legend_beside(figure, handles, texts)
    return figure


def _curve(row: Row) -> Points:
    """A job's validation losses; none where it has left no metrics of Lightning's kind."""
    try:
        return joined(parts_of(row.folder / "metrics.csv"), "val_loss")[0]
    except (OSError, KeyError, ValueError, csv.Error):
        return []


def _name(sweep: Sweep, row: Row) -> str:
    mark = {"finished": "", "stopped": " (stopped)"}.get(row.state, f" ({row.state})")
    kind = "best: " if row is sweep.best else ""
    return cut(f"{kind}job {row.number}{mark} {sweep.label(row)}".rstrip(), 52)
