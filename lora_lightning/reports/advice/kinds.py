"""A piece of advice, and how lists of layers are told in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

SEVERITIES = ("warning", "hint")


@dataclass(frozen=True)
class Advice:
    """What one rule has to say of a run.

    Attributes:
        rule: The rule's name.
        severity: ``"warning"`` where something went wrong, ``"hint"`` where another setting may do better.
        sentence: What was seen, and what to do.
        numbers: What it was seen by.
        override: Settings to paste behind the command of the run; None where none says it.
    """

    rule: str
    severity: str
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    override: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)


def counted(kinds: Iterable[str], most: int = 8) -> str:
    """Kinds of layers with how many there are of each.

    >>> counted(["q_proj", "v_proj", "q_proj"])
    'q_proj (×2), v_proj'
    """
    counts = Counter(kinds)
    told = [f"{kind} (×{count})" if count > 1 else kind for kind, count in counts.items()]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more kinds" if len(told) > most else "")


def percent(share: float) -> str:
    """A share between 0 and 1, in words short enough for a sentence.

    >>> percent(0.5), percent(0.034), percent(0.0)
    ('50 %', '3.4 %', '0 %')
    """
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
