"""What a sweep leaves: tables, pictures and the best adapter, made from its folder alone, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.whole import write_whole
from lora_lightning.sweeps.report.best import keep_best
from lora_lightning.sweeps.report.collect import Sweep, check_metric, collect
from lora_lightning.sweeps.report.data import as_data
from lora_lightning.sweeps.report.tables import as_csv, as_markdown, as_table

__all__ = ["Sweep", "as_data", "as_table", "collect", "write", "write_report"]

CSV, MARKDOWN = "sweep.csv", "sweep.md"


def write_report(folder: Path, *, metric: str | None = None, mode: str | None = None) -> Path:
    """Write what a sweep says: ``sweep.csv``, ``sweep.md``, pictures in ``plots/`` and the best adapter in ``best/``.

    It is made from the folder alone and can be made again at any time, while the sweep runs too: nothing in it depends
    on when.

    Args:
        folder: The sweep's folder.
        metric: What to compare jobs by; None: what the sweep says.
        mode: ``min`` or ``max``: which end of the metric is good; None: what the sweep says.

    Returns:
        The path of ``sweep.md``.

    Raises:
        LoraConfigError: It is no folder of a sweep, or no finished job reports the metric (``sweep.csv`` is written
            then). That ``best/`` is somebody's own is only told: a search goes on, and all else is written.
    """
    return write(collect(folder, metric=metric, mode=mode))


def write(sweep: Sweep) -> Path:
    """The same for a sweep that has been read."""
    from lora_lightning.sweeps.report.plots import draw_all  # matplotlib

    write_whole(sweep.folder / CSV, as_csv(sweep))
    check_metric(sweep)
    report = sweep.folder / MARKDOWN
    write_whole(report, as_markdown(sweep, draw_all(sweep)))
    try:
        keep_best(sweep)
    except LoraConfigError as error:
        print(error, file=sys.stderr)
    return report
