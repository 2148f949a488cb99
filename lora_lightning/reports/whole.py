"""Text files that are there whole, or as they were before."""

from __future__ import annotations

import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a text beside its place and move it there: whoever reads the file finds all of it, or what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        return beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
