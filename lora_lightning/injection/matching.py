"""How the names in a config are compared with those in a model: PEFT's meanings, looked up where lists are long."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence


def matches(names: str | Collection[str], name: str) -> bool:
    r"""Whether a module name is meant: the whole of a regular expression, or equal to or ending in a list's entry.

    >>> matches(["q_proj"], "layers.0.q_proj"), matches(["q_proj"], "layers.0.my_q_proj")
    (True, False)
    >>> matches(r".*\.(q|v)_proj", "layers.0.v_proj")
    True
    """
    return bool(entries_for(names, name))


def entries_for(names: str | Collection[str], name: str) -> list[str]:
    """The entries by which a module name is meant (see :func:`matches`), from the longest on.

    An entry of a list is looked up, not compared with: give a set or a dict where there are many.
    """
    if isinstance(names, str):
        return [names] if re.fullmatch(names, name) else []
    return [end for end in _ends(name) if end in names]


def _ends(name: str) -> Iterator[str]:
    """A name and what is left of it after each of its dots."""
    yield name
    while dot := name.find(".") + 1:
        name = name[dot:]
        yield name


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    r"""The value of the first key that matches the end of a name, or the default.

    >>> pattern_value({"q_proj": 4, r"layers\.1\..*": 2}, "layers.1.v_proj", 8)
    2
    """
    for key, tail, pattern in compiled_patterns(tuple(patterns)):
        if name.endswith(tail) and pattern.match(name):
            return patterns[key]
    return default


@functools.lru_cache(maxsize=32)
def compiled_patterns(keys: tuple[str, ...]) -> list[tuple[str, str, re.Pattern[str]]]:
    """Each key with what names that it matches must end in, and the expression that decides.

    A saved adapter may have a key for every layer. Most are plain names: their last part sorts out nearly all without
    an expression being run.
    """
    tails = (key.rpartition(".")[2] if re.fullmatch(r"\^?[\w.]+", key) else "" for key in keys)
    return [
        (key, tail.removeprefix("^"), re.compile(rf"(.*\.)?({key})$")) for key, tail in zip(keys, tails, strict=True)
    ]


def patterns_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Keys that :func:`pattern_value` finds given values by, for what is not the default.

    A key is the last part of names where all of that name agree, else a whole name.

    >>> patterns_for({"0.q": 4, "1.q": 4, "0.v": 8, "1.v": 2}, 8)
    {'q': 4, '1.v': 2}
    """
    by_last: dict[str, list[str]] = {}
    for name in values:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    found: dict[str, float] = {}
    for last, names in by_last.items():
        if len({values[name] for name in names}) == 1:
            found[last] = values[names[0]]
        else:
            found |= {_only(name, names): values[name] for name in names}
    return {key: value for key, value in found.items() if value != default}


def _only(name: str, names: Sequence[str]) -> str:
    """A key that matches a name and none that ends in it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
