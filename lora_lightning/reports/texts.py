"""Texts of models and data, made harmless for a screen or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""A text whose control characters, which a terminal would obey, are replaced; line ends stay.

    >>> printable("a\x1b[2Jb").replace("\N{REPLACEMENT CHARACTER}", "?")
    'a?[2Jb'
    """
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
