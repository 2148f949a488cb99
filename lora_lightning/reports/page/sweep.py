"""The page of a sweep, from the plain data that its report is made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.reports.page import render
from lora_lightning.reports.page.files import listed

_FILES = {
    "best": "the best job's adapter",
    "sweep.md": "the report as text",
    "sweep.csv": "every number of every job",
    "plots": "the pictures",
    "sweep.json": "which sweep this is",
}
_LEFT_OUT = "adapter"  # a path; its job's own page has it


def sweep_page(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Write ``report.html`` of a sweep.

    Args:
        folder: The sweep's folder.
        data: What its report says: see `lora_lightning.sweeps.report.as_data`.

    Raises:
        AdapterError: There is a ``report.html`` that is not ours.
    """
    folder = Path(folder).absolute()
    links = {number: _link(folder, place) for number, place in data["folders"].items()}
    return render.write(
        folder,
        "sweep.html.j2",
        title=data["name"],
        sweep=data,
        best_link=None if data["best"] is None else links.get(data["best"]["number"]),
        tables=[_table(each, links) for each in data["tables"]],
        pictures=[
            {"name": Path(name).stem.replace("_", " "), "data": render.picture(folder / name)}
            for name in data["pictures"]
        ],
        files=listed(folder, _FILES),
    )


def try_sweep_page(folder: str | os.PathLike[str], data: Mapping[str, Any]) -> Path | None:
    """The same where a sweep ends, which does not fail for its page: what went wrong is warned of."""
    try:
        return sweep_page(folder, data)
    except Exception as error:  # whatever it is, the table and the best adapter matter more
        warnings.warn(f"The page of {folder} could not be written: {error!r}", stacklevel=2)
        return None


def _link(folder: Path, place: str) -> str:
    """A job's page where it has one, else its folder."""
    page = Path(place) / render.PAGE
    return render.link(page if (folder / page).is_file() else f"{place}/")


def _table(table: Mapping[str, Any], links: Mapping[str, str]) -> dict[str, Any]:
    """A table without its column of paths, whose job numbers lead to the jobs."""
    kept = [place for place, heading in enumerate(table["headings"]) if heading != _LEFT_OUT]
    job = table["headings"].index("job") if "job" in table["headings"] else None
    return {
        "title": table["title"],
        "note": table["note"],
        "headings": [(table["headings"][place], table["right"][place]) for place in kept],
        "lines": [
            {
                "best": line[0] == "best",
                "cells": [
                    (line[place], table["right"][place], links.get(line[place]) if place == job else None)
                    for place in kept
                ],
            }
            for line in table["lines"]
        ],
    }
