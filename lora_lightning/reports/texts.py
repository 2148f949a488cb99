"""Texts of models and data, made harmless for a screen or a page."""

from __future__ import annotations

import unicodedata

# Turn the direction of what follows, so that a text can seem to be another one.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""A text whose control characters, which a terminal would obey, are replaced; line ends and tabs stay.

    >>> printable("a\x1b[2Jb").replace("\N{REPLACEMENT CHARACTER}", "?")
    'a?[2Jb'
    >>> printable("10\xa0%\tمی\u200cخواهم") == "10\xa0%\tمی\u200cخواهم"  # blanks and joiners of any writing are text
    True
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_obeyed(sign) else sign for sign in text)


def _is_obeyed(sign: str) -> bool:
    return sign in _TURNING or (sign not in "\n\t" and unicodedata.category(sign) in ("Cc", "Cs"))
