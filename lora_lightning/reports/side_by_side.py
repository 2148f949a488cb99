"""Two models measured on the same: a base and its adapted self, with what has become better and what worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from lora_lightning.reports.upwards import is_higher_better


class Measured(NamedTuple):
    """One metric of both.

    Attributes:
        name: What it is called.
        base: Of the base model.
        adapted: Of the model with the adapter.
        higher_is_better: Which way is up, or None where nobody says.
        base_stderr: The standard error of ``base``, where it is known.
        adapted_stderr: That of ``adapted``.
    """

    name: str
    base: float
    adapted: float
    higher_is_better: bool | None = None
    base_stderr: float | None = None
    adapted_stderr: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the adapter has made it better; no word where it is not known which way is up.

        >>> Measured("val_loss", 4.4, 2.5, False).verdict
        'better'
        >>> Measured("acc", 0.50, 0.52, True, 0.05, 0.05).verdict
        'within error'
        """
        change = self.adapted - self.base
        if not math.isfinite(change):
            return ""
        if change == 0:
            return "same"
        if abs(change) <= math.hypot(self.base_stderr or 0.0, self.adapted_stderr or 0.0):
            return "within error"
        if self.higher_is_better is None:
            return ""
        return "better" if (change > 0) == self.higher_is_better else "worse"


def of_metrics(base: Mapping[str, float], adapted: Mapping[str, float]) -> list[Measured]:
    """Pair the metrics that Lightning has logged, ``val_loss`` and the like."""
    return [Measured(name, base.get(name, math.nan), value, is_higher_better(name)) for name, value in adapted.items()]


def comparison(measured: Sequence[Measured]) -> Table:
    """All metrics in one table, a line each."""
    table = Table("Metric", title="Base and adapter", title_justify="left")
    for heading in ("Base", "With adapter", "Change"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for each in measured:
        table.add_row(
            each.name,
            _with_error(each.base, each.base_stderr),
            _with_error(each.adapted, each.adapted_stderr),
            f"{each.adapted - each.base:+.4f}",
            each.verdict,
        )
    return table


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
