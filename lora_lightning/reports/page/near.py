"""The error for a folder that a page was asked for and that is no run's and no sweep's: what is there instead."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.page.folder import is_run

_MOST = 8


def neither(folder: Path) -> LoraConfigError:
    """Say what a folder is not, what it holds, and which runs are near."""
    expected = "a run's has a result.json, metrics.csv, config.yaml or about.json, a sweep's a sweep.json"
    if not folder.exists():
        return LoraConfigError(f"There is no folder {folder}{_runs_near(_nearest(folder))}")
    if not folder.is_dir():
        return LoraConfigError(f"{folder} is a file, and a folder is expected: {expected}{_runs_near(folder.parent)}")
    names = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
    there = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
    return LoraConfigError(
        f"{folder} is the folder of neither a run nor a sweep: {expected}. "
        f"{f'It holds {there}' if names else 'It is empty'}{_runs_near(folder)}"
    )


def _nearest(folder: Path) -> Path:
    return next((each for each in folder.absolute().parents if each.is_dir()), folder)


def _runs_near(folder: Path) -> str:
    """The runs in a folder, or in those in it, the newest first; or the one that it lies in."""
    above = next((each for each in (folder, *folder.absolute().parents[:2]) if is_run(each)), None)
    if above is not None:
        return f".\nThe run that it belongs to: {above}"
    found = [each for pattern in ("*", "*/*") for each in folder.glob(pattern) if each.is_dir() and is_run(each)]
    found.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    return ".\nRuns there: " + ", ".join(map(str, found[:3])) if found else ""
