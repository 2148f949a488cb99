"""Checks of single fields of a config: each gives what is wrong with a value, a line each, or nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.errors import did_you_mean

# Names that other tools use for the same thing: told, never accepted.
ALIASES = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "rs_lora": "use_rslora",
    "dora": "use_dora",
    "exclude": "exclude_modules",
    "init_weights": "init_lora_weights",
}


def plain(value: Any) -> Any:
    """Lists for sequences and dicts for mappings, all the way down (OmegaConf's containers are both)."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """A key that is no field: what it is called here, or what it is near to."""
    if key in ALIASES:
        return f"unknown key {key!r}: it is called {ALIASES[key]!r} here"
    return f"unknown key {key!r}{did_you_mean(key, known)}"


def check_rank(name: str, value: Any) -> list[str]:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{name} must be a whole number of at least 1, got {value!r}"]
    return [] if value >= 1 else [f"{name} must be at least 1, got {value}"]


def check_number(name: str, value: Any) -> list[str]:
    """A finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return [] if good else [f"{name} must be a finite number, got {value!r}"]


def check_choice(name: str, value: Any, choices: tuple[str, ...], also: str = "") -> list[str]:
    """One of some words; ``also`` names what else is right."""
    if value in choices:
        return []
    listed = ", ".join([also, *choices] if also else choices)
    return [f"{name} must be one of {listed}, got {value!r}{did_you_mean(str(value), choices)}"]


def check_regex(name: str, pattern: str) -> list[str]:
    """A regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name}: {pattern!r} is not a regular expression ({error})"]
    return []


def check_names(name: str, value: Any, *, pattern_allowed: bool, may_be_empty: bool = False) -> list[str]:
    """A list of names, or where it is allowed a regular expression."""
    if value is None and not pattern_allowed:
        return []
    if isinstance(value, str) and pattern_allowed:
        return check_regex(name, value) if value else [f"{name} is an empty string"]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        forms = "a list of module names" + (" or a regular expression" if pattern_allowed else "")
        return [f"{name} must be {forms}, got {value!r}"]
    if not value and pattern_allowed and not may_be_empty:
        return [f"{name} is an empty list: nothing would be adapted; write 'all-linear' or name the layers"]
    return []


def check_patterns(rank_pattern: Any, alpha_pattern: Any) -> list[str]:
    """Mappings from names to ranks and to alphas."""
    problems = []
    checks = (("rank_pattern", rank_pattern, check_rank), ("alpha_pattern", alpha_pattern, check_number))
    for name, pattern, check in checks:
        if not isinstance(pattern, dict):
            problems.append(f"{name} must map layer names to numbers, got {pattern!r}")
            continue
        for key, value in pattern.items():
            problems += check_regex(name, str(key)) + check(f"{name}[{key!r}]", value)
    return problems


def check_switch(name: str, value: Any) -> list[str]:
    """True or false, and not what is like it."""
    return [] if isinstance(value, bool) else [f"{name} must be true or false, got {value!r}"]


def check_numbers(name: str, value: Any) -> list[str]:
    """None, or a list of whole numbers from 0 on, at least one."""
    if value is None or (isinstance(value, list) and value and all(_is_count(each) for each in value)):
        return []
    return [f"{name} must be a list of whole numbers from 0 on, got {value!r}"]


def check_tokens(name: str, value: Any) -> list[str]:
    """Numbers of tokens, or such for each of several embeddings; each once."""
    if not isinstance(value, dict):
        lists = {name: value}
    else:
        lists = {f"{name}[{key!r}]": tokens for key, tokens in value.items()}
    problems = [problem for key, tokens in lists.items() for problem in check_numbers(key, tokens)]
    return problems or [
        f"{key} has token {twice[0]} more than once"
        for key, tokens in lists.items()
        if (twice := [token for token in tokens or [] if tokens.count(token) > 1])
    ]


def check_spans(name: str, value: Any) -> list[str]:
    """None, or a list of spans ``[first, end)`` of layer numbers."""
    spans = value if isinstance(value, list) and value else [None]
    if value is None or all(_is_span(each) for each in spans):
        return []
    return [f"{name} must be a list of spans of layers, [[first, end], …] with first < end, got {value!r}"]


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] < value[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def listed(title: str, problems: list[str]) -> str:
    """A title, and problems below it."""
    return f"{title}:" + "".join(f"\n  - {problem}" for problem in problems)
