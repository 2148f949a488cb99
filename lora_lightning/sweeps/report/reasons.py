"""Why a job has not finished, in one line."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Killed|Warning)\b(?::|$)")
_TOLD = re.compile(r"^(?:Configuration|Adapter) ─+$")
_READ = 65_536  # the last bytes of a log that are looked at


def reason_of(state: str, result: dict[str, Any], progress: dict[str, Any] | None, log: Path) -> str:
    """Why a job failed, was stopped or how far it is; empty for one that has finished or not begun.

    Args:
        state: The job's state, as in `Row.state`.
        result: Its ``result.json``.
        progress: Its ``progress.json``, where it has one.
        log: What it has printed.
    """
    if state in ("stopped", "finished"):
        return str(result.get("ended_by") or "")
    far = f"at step {progress['step']} of {progress['steps']}" if progress and progress.get("steps") else ""
    if state == "unfinished":
        return far or "it has begun and left no result"
    if state == "interrupted":
        steps = result.get("steps")
        return far or (f"at step {steps}" if steps is not None else "interrupted")
    if state == "failed":
        return str(result.get("reason") or result.get("error") or _in_log(log) or "nothing in its log says why")
    return ""


def _in_log(log: Path) -> str:
    """The line of a log that says what went wrong: an error that was told, else an exception, else the last words."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _READ))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines() if line.strip()]
    told = [after for line, after in pairwise(lines) if _TOLD.match(line)]
    spoken = [line for line in lines if any(letter.isalnum() for letter in line)]
    errors = [line for line in spoken if _ERROR.match(line)]
    return (told[-1:] or errors[-1:] or spoken[-1:] or [""])[0]
