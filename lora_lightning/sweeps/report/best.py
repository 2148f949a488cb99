"""The adapter of the best job, where one looks for it: ``best/`` in the sweep's folder."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.report.collect import Row, Sweep
from lora_lightning.sweeps.report.tables import final_adapter
from lora_lightning.sweeps.runs import read_json

FOLDER, CARD = "best", "best.json"


def keep_best(sweep: Sweep) -> Path | None:
    """Copy the best job's adapter to ``best/`` and write ``best.json`` beside its files.

    The metric is that of the final weights, so the copy is of the adapter that the job has ended with, not of its best
    checkpoint's. An earlier ``best/`` of this function's own is replaced as a whole.

    Returns:
        The folder, or None where no job has a metric.

    Raises:
        LoraConfigError: ``best/`` holds files that are not from here; it is left as it is.
    """
    row, place = sweep.best, sweep.folder / FOLDER
    if row is None:
        return None
    _refuse_others_files(place)
    source = final_adapter(row)
    files = {} if source is None else {path.relative_to(source).as_posix(): path for path in _files(source)}
    card = _card(sweep, row, source, sorted(files))
    if read_json(place / CARD) == card and all(_same(path, place / name) for name, path in files.items()):
        return place
    made = sweep.folder / f".{FOLDER}-{secrets.token_hex(4)}.tmp"
    try:
        made.mkdir()
        for name, path in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, made / name)
        (made / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        _replace(place, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def command_of(sweep: Sweep, row: Row) -> str:
    """The command that trains a job again: the sweep's script and configuration with the job's settings."""
    script = sweep.script or "scripts/train.py"
    program = ["python", script] if script.endswith(".py") else ["python", "-m", script]
    flags = re.compile(r"--config-(name|dir|path)(=.*)?|-c[ndp]")
    words = list(sweep.command[1:])
    chosen = [
        each
        for index, word in enumerate(words)
        if (found := flags.fullmatch(word))
        for each in (words[index : index + 1] if found[2] else words[index : index + 2])
    ]
    return shlex.join([*program, *chosen, *row.overrides])


def _card(sweep: Sweep, row: Row, source: Path | None, files: list[str]) -> Mapping[str, Any]:
    return {
        "number": row.number,
        "overrides": list(row.overrides),
        "metric": sweep.metric,
        "mode": sweep.mode,
        "value": row.metric,
        "folder": sweep.inside(row.folder),
        "adapter": None if source is None else sweep.inside(source),
        "command": command_of(sweep, row),
        "files": files,
    }


def _files(folder: Path) -> list[Path]:
    """All files of an adapter; what the run keeps below it under other adapters' names goes with it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _refuse_others_files(place: Path) -> None:
    """Make sure that a folder is this module's own, or is not there."""
    if not place.exists() and not place.is_symlink():
        return
    known = (read_json(place / CARD) or {}).get("files")
    if not isinstance(known, list):
        what = "has no best.json of a sweep's report"
    elif strange := sorted({path.relative_to(place).as_posix() for path in _files(place)} - {CARD, *known}):
        what = f"holds {', '.join(strange[:5])}, which no report has put there"
    else:
        return
    raise LoraConfigError(f"{place} {what}: the best adapter is not written there. Move it away and report again")


def _replace(place: Path, made: Path) -> None:
    """Put a folder in another's place; that one is put back if this fails."""
    aside = made.with_suffix(".old")
    had = place.exists()
    if had:
        place.rename(aside)
    try:
        made.rename(place)
    except OSError:
        if had:
            aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)
