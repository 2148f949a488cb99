"""What lies in a folder, for the links at a page's end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_lightning.reports.page.words import bytes_of


def listed(folder: Path, meanings: Mapping[str, str]) -> list[dict[str, str]]:
    """The files and folders that are there, each with its name, its meaning and its size in words.

    Args:
        folder: Where they are looked for.
        meanings: What each is, by its name.
    """
    return [
        {"name": name + "/" * path.is_dir(), "meaning": meaning, "size": bytes_of(size_of(path))}
        for name, meaning in meanings.items()
        if (path := folder / name).exists()
    ]


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 where there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())
