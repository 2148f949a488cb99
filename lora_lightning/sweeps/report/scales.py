"""How the values of a setting lie on an axis of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lora_lightning.sweeps.report.values import is_number, order, shown

_MOST_TICKS = 10
_LONGEST = 22  # characters of a word beside an axis


class Scale(NamedTuple):
    """An axis for the values of one setting.

    Attributes:
        kind: ``log2`` (ranks), ``log10`` (rates and whatever spans a lot), ``linear``, or ``words``: one place a value.
        values: The distinct values, in order.
    """

    kind: str
    values: tuple[Any, ...]

    def place(self, value: Any) -> float:
        """Where a value lies; one unit is a doubling, a power of ten, one, or the next word."""
        if self.kind == "words":
            return [shown(each) for each in self.values].index(shown(value))
        return {"log2": math.log2, "log10": math.log10, "linear": float}[self.kind](value)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places of the axis and what is written there: the values themselves, or some of many."""
        values: Sequence[Any] = self.values
        if len(values) > _MOST_TICKS:
            chosen = [round(index * (len(values) - 1) / (_MOST_TICKS - 1)) for index in range(_MOST_TICKS)]
            values = [values[index] for index in chosen] if self.kind == "words" else self._even()
        return [(self.place(value), cut(shown(value), _LONGEST)) for value in values]

    def _even(self) -> list[float]:
        """Round numbers within the values, evenly spread on the axis."""
        low, high = self.place(self.values[0]), self.place(self.values[-1])
        if self.kind == "linear":
            step = 10 ** math.floor(math.log10((high - low) / 2))
            step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
            return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
        base = 2.0 if self.kind == "log2" else 10.0
        powers = [base**power for power in range(math.floor(low), math.ceil(high) + 1)]
        between = [value * factor for value in powers for factor in (1, 2, 5)] if self.kind == "log10" else powers
        within = [value for value in between if low <= self.place(value) <= high]
        whole = [value for value in powers if low <= self.place(value) <= high]
        return within if len(within) <= 6 else whole[:: math.ceil(len(whole) / _MOST_TICKS)]


def scale_of(key: str, values: Iterable[Any]) -> Scale:
    """The axis that suits a setting: ranks double, learning rates go by powers of ten, words stand side by side."""
    by_text = {shown(value): value for value in values}
    distinct = tuple(sorted(by_text.values(), key=order))
    if not all(is_number(value) and math.isfinite(value) for value in distinct):
        return Scale("words", distinct)
    name, positive = key.rpartition(".")[2], distinct[0] > 0
    if positive and name in ("r", "rank", "lora_alpha", "alpha", "batch_size"):
        return Scale("log2", distinct)
    if positive and (name in ("lr", "learning_rate") or _crowded_at_zero(distinct)):
        return Scale("log10", distinct)
    return Scale("linear", distinct)


def _crowded_at_zero(values: Sequence[float]) -> bool:
    """Whether half of the values would lie in the first tenth of a linear axis."""
    return values[len(values) // 2] - values[0] < 0.1 * (values[-1] - values[0])


def limits(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The part of the metric's axis that is worth showing: with a diverged job at 1e5 the others would be one line.

    Args:
        values: The metric of all jobs.
        mode: ``min`` or ``max``: which end is good.

    Returns:
        The lower and the upper end. All values lie within unless the bad ones are far from the good half.
    """
    sign = -1.0 if mode == "max" else 1.0
    costs = sorted(sign * value for value in values)
    best, worst, middle = costs[0], costs[-1], costs[len(costs) // 2]
    usual = max(3 * (middle - best), 1e-9)
    if len(costs) >= 4 and worst - best > 3 * usual:
        worst = max(cost for cost in costs if cost - best <= usual)
    margin = 0.06 * (worst - best) or 0.05 * abs(best) or 1.0
    ends = sign * (best - margin), sign * (worst + margin)
    return min(ends), max(ends)


def cut(text: str, longest: int) -> str:
    """Text of at most so many characters.

    >>> cut("[q_proj,k_proj,v_proj]", 12)
    '[q_proj,k_p…'
    """
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
