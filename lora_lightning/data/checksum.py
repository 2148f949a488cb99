"""Files and texts by their content."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_PIECE = 1 << 24


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, a few megabytes at a time."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def sha256(content: Iterable[bytes]) -> str:
    """What tells one content from another, in 64 signs.

    >>> sha256([b"ab", b"c"]) == sha256([b"abc"])
    True
    """
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def crc32(content: Iterable[bytes]) -> int:
    """What tells a content from the same one damaged: several times as fast to compute."""
    checksum = 0
    for piece in content:
        checksum = zlib.crc32(piece, checksum)
    return checksum
