"""The two kinds of error this package raises on purpose, and the help that goes into their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraConfigError(ValueError):
    """Something the user wrote is wrong: a setting, a name, a data file. The message lists every problem found."""


class AdapterError(RuntimeError):
    """An adapter folder, a checkpoint or the state of a model does not allow what was asked for."""


def did_you_mean(word: str, candidates: Iterable[str], *, most: int = 3) -> str:
    """A half-sentence that names the nearest candidates, or an empty string where none is near.

    Args:
        word: What was given.
        candidates: What would have been understood.
        most: At most so many candidates are named.

    Returns:
        ``' (did you mean q_proj?)'``, with a leading blank so that it can be appended to the word, or ``''``.

    >>> did_you_mean("q_porj", ["q_proj", "v_proj"], most=1)
    ' (did you mean q_proj?)'
    >>> did_you_mean("zzz", ["q_proj"])
    ''
    """
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    near = difflib.get_close_matches(word.lower(), by_lower, n=most, cutoff=0.6)
    return f" (did you mean {' or '.join(by_lower[name] for name in near)}?)" if near else ""
