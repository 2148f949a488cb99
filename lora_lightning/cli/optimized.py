"""The number that a job is worth to a sweeper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.errors import LoraConfigError, did_you_mean


def optimized(name: str | None, measured: Mapping[str, Any]) -> float | None:
    """The value of ``optimized_metric`` among what was measured, or None where none is named.

    Raises:
        LoraConfigError: It was not measured; what was is named.
    """
    if name is None:
        return None
    if measured.get(name) is None:
        known = [key for key, value in measured.items() if isinstance(value, float)]
        raise LoraConfigError(
            f"optimized_metric={name!r} was not measured{did_you_mean(name, known)}. Measured were {', '.join(known)}"
        )
    return float(measured[name])


def is_typed(overrides: Sequence[str]) -> bool:
    """Whether the metric was named on the command line; else it is the default, which not every run measures."""
    return any(each.lstrip("+").startswith("optimized_metric=") for each in overrides)
