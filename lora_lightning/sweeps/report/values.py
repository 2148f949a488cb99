"""What overrides say: keys and typed values, and how values and keys are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_EXPONENT = re.compile(r"e\+?(-?)0*(\d)")
_WORDS = {"null": None, "true": True, "false": False}


def settings_of(overrides: Iterable[str]) -> dict[str, Any]:
    """The keys of overrides and their values; of a key set twice, the later value.

    >>> settings_of(["lora.r=8", "+extra='a b'", "~callbacks.samples", "optimizer.lr=1e-3"])
    {'lora.r': 8, 'extra': 'a b', 'callbacks.samples': '(left out)', 'optimizer.lr': 0.001}
    """
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+~"): "(left out)" if key.startswith("~") else typed(text) for key, _, text in pairs}


def typed(text: str) -> Any:
    """A value as Hydra's overrides mean it: a number, a truth value, null, or text; lists and tables stay text.

    >>> [typed(text) for text in ("8", "1e-3", "true", "null", "'8'", "[a, b]", "1_000")]
    [8, 0.001, True, None, '8', '[a, b]', 1000]
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def is_number(value: Any) -> bool:
    """Whether a value is a number; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def order(value: Any) -> tuple[int, Any]:
    """A key to sort values of any kinds by: numbers first, by size, then the rest by its text."""
    return (0, value) if is_number(value) and value == value else (1, shown(value))


def shown(value: Any, *, zeros: bool = False) -> str:
    """A value for people, as it would be typed.

    Args:
        value: What a setting or a result holds.
        zeros: Whether zeros at the end of a fraction stay, so that numbers below each other are equally exact.

    >>> [shown(value) for value in (8, 0.001, 3e-05, True, None, "all-linear")]
    ['8', '0.001', '3e-5', 'true', 'null', 'all-linear']
    """
    if isinstance(value, float):
        text = f"{value:#.5g}" if zeros else f"{value:.5g}"
        return _EXPONENT.sub(r"e\1\2", text)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
