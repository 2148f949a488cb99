"""Successive halving: at each rung the worse part of the jobs stops, and waiting ones take their places.

A rung is a share of a job's steps. Whoever comes to one is compared with all that ever came to it, so that a job which
started late has to be as good as those before it were at that point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from lora_lightning.errors import LoraConfigError, did_you_mean


@dataclass(frozen=True)
class Plan:
    """Where the rungs are.

    Attributes:
        eta: Of this many jobs one goes on, and each rung is this many times as far as the one before it.
        first: Where the first rung is, as a share of a job's steps.
    """

    eta: int = 2
    first: float = 0.25

    @classmethod
    def of(cls, setting: Any) -> Plan | None:
        """What ``sweep.halving`` says: None or false for no halving, true for the usual one, or a mapping.

        Raises:
            LoraConfigError: It is something else.

        >>> Plan.of({"eta": 3})
        Plan(eta=3, first=0.25)
        """
        if setting is None or setting is False:
            return None
        if setting is True:
            return cls()
        if not isinstance(setting, Mapping):
            raise LoraConfigError(f"sweep.halving must be true, false, or the keys eta and first, got {setting!r}")
        if unknown := sorted({*setting} - {"eta", "first"}):
            near = did_you_mean(unknown[0], ["eta", "first"])
            raise LoraConfigError(f"sweep.halving has the keys eta and first, got {unknown[0]!r}{near}")
        plan = cls(**{str(key): value for key, value in setting.items() if value is not None})
        if not isinstance(plan.eta, int) or plan.eta < 2:
            raise LoraConfigError(f"sweep.halving.eta must be a whole number of at least 2, got {plan.eta!r}")
        if isinstance(plan.first, bool) or not isinstance(plan.first, (int, float)) or not 0 < plan.first < 1:
            raise LoraConfigError(f"sweep.halving.first must be a share of the steps, as 0.25, got {plan.first!r}")
        return plan

    def rungs(self, steps: int) -> list[int]:
        """The optimizer steps at which a run of so many steps is compared with others.

        >>> Plan().rungs(40), Plan(eta=3, first=1/9).rungs(90), Plan().rungs(3)
        ([10, 20], [10, 30], [])
        """
        share, found = Fraction(self.first).limit_denominator(10**6), []
        while share < 1:
            found.append(math.floor(share * steps))
            share *= self.eta
        # A schedule that warms up takes its first step at a rate of zero: all are equal after it.
        return sorted({step for step in found if 1 < step < steps})


class Place(NamedTuple):
    """How a job stands at a rung."""

    place: int
    """From 1, the best."""
    of: int
    """How many ever came to this rung."""
    stays: bool
    """Whether it goes on."""


class Board:
    """What every job has reported at every rung.

    Args:
        eta: Of this many jobs one goes on.
        mode: ``"min"`` or ``"max"``: which value is the better one.
        earlier: By the number of a job, what it has reported in an earlier part of the sweep, from the first rung on.
    """

    def __init__(self, eta: int, mode: str, earlier: Mapping[int, list[float]] | None = None) -> None:
        self.eta, self.mode = eta, mode
        self._values: dict[int, dict[int, float]] = {}
        for number, values in (earlier or {}).items():
            for rung, value in enumerate(values):
                self.report(rung, number, value)

    def report(self, rung: int, number: int, value: float) -> None:
        """Take note of a job's value at a rung."""
        self._values.setdefault(rung, {})[number] = value

    def place(self, rung: int, number: int) -> Place:
        """How a job stands among all that have reported at a rung; of equal ones the lower number is the better."""
        values = self._values[rung]
        order = sorted(values, key=lambda each: (self._badness(values[each]), each))
        place = order.index(number) + 1
        return Place(place, len(order), place <= math.ceil(len(order) / self.eta))

    def _badness(self, value: float) -> float:
        if math.isnan(value):
            return math.inf
        return -value if self.mode == "max" else value
