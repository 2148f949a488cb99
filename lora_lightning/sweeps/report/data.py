"""A sweep as plain data, for whoever shows it in another way."""

from __future__ import annotations

from typing import Any

from lora_lightning.sweeps.report.best import command_of
from lora_lightning.sweeps.report.collect import Sweep
from lora_lightning.sweeps.report.plots import drawn
from lora_lightning.sweeps.report.tables import command_line, final_adapter, sections, summary
from lora_lightning.sweeps.report.values import shown


def as_data(sweep: Sweep) -> dict[str, Any]:
    """What the report says, in mappings, lists and texts alone; paths as seen from the sweep's folder.

    Returns:
        ``name``, ``folder``, ``command`` (or None), ``summary``, ``jobs`` and how many are ``finished``; ``best``
        (None, or ``number``, ``label``, ``metric``, ``value``, ``folder``, ``adapter`` and ``command``); ``tables``,
        each with ``title``, ``note``, ``headings``, ``right`` (which columns are figures) and ``lines``; ``folders``
        by the number of a job, as a text; and the ``pictures`` that were drawn.
    """
    best = sweep.best
    return {
        "name": sweep.name,
        "folder": str(sweep.folder),
        "command": command_line(sweep) if sweep.command else None,
        "summary": summary(sweep),
        "jobs": len(sweep.rows),
        "finished": len(sweep.of_state("finished", "stopped", "same")),
        "best": None
        if best is None
        else {
            "number": str(best.number),
            "label": sweep.label(best),
            "metric": sweep.metric,
            "value": shown(best.metric, zeros=True),
            "folder": sweep.inside(best.folder),
            "adapter": None if (path := final_adapter(best)) is None else sweep.inside(path),
            "command": command_of(sweep, best),
        },
        "tables": [each._asdict() | {"right": each.right} for each in sections(sweep)],
        "folders": {str(row.number): sweep.inside(row.folder) for row in sweep.rows if row.folder.is_dir()},
        "pictures": drawn(sweep),
    }
