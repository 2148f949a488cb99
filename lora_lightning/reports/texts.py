"""Texts of models and data, made harmless for a screen or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are replaced; line ends stay.

    >>> printable("a\\x1b[2Jb\\nc")
    'a\ufffd[2Jb\\nc'
    """
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
