"""What came out of a run, as the few numbers that stand large on its page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lora_lightning.reports.page.files import size_of
from lora_lightning.reports.page.folder import Run
from lora_lightning.reports.page.words import bytes_of, counted, duration, figure
from lora_lightning.reports.upwards import is_higher_better

_NAMES = {"loss": "Loss", "perplexity": "Perplexity", "accuracy": "Accuracy", "f1": "F1"}
_SHARES = ("accuracy", "f1", "precision", "recall")


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        label: What it is.
        value: It, after training.
        before: It, before training; None where that was not measured.
        change: How far it moved, in words; empty where that is not known.
        good: Whether that is the wanted direction; None where it did not move.
        note: What else there is to say of it.
    """

    label: str
    value: str
    before: str | None = None
    change: str = ""
    good: bool | None = None
    note: str = ""


def measured(run: Run) -> list[Figure]:
    """The validation metrics before and after, the loss first, then those of the test."""
    found = []
    for prefix, kind in (("val_", "Validation"), ("test_", "Test")):
        names = [
            key.removeprefix(prefix)
            for key, value in run.result.items()
            if key.startswith(prefix) and not key.endswith("_before") and _number(value) is not None
        ]
        for name in sorted(names, key=lambda name: (name != "loss", list(run.result).index(f"{prefix}{name}"))):
            after = float(run.result[f"{prefix}{name}"])
            found.append(_compared(kind, name, _number(run.result.get(f"{prefix}{name}_before")), after))
    if not found:  # a run without a result yet: what its curves say so far
        for column, points in run.curves.items():
            if column.startswith("val_"):
                step, value = points[-1]
                label = f"Validation {_named(column.removeprefix('val_')).lower()} so far"
                found.append(Figure(label, _shown(column, value), note=f"at step {step:,}"))
    return found


def facts(run: Run) -> list[Figure]:
    """What it took: parameters, size, steps, time, speed, memory. What is not known is left out."""
    found = []
    adapted = run.about.get("adapted") or {}
    trains = _number(run.result.get("trainable_parameters") or adapted.get("trainable_parameters"))
    total = _number(run.result.get("total_parameters") or adapted.get("total_parameters"))
    if trains and total:
        found.append(
            Figure(
                "Trains",
                f"{trains / total:.2%}".replace("%", " %"),
                note=f"{counted(trains)} of {counted(total)} parameters",
            )
        )
    if size := size_of(run.folder / "adapter"):
        found.append(Figure("Adapter", bytes_of(size), note="on disk"))
    if run.steps:
        planned = run.planned_steps
        found.append(Figure("Steps", f"{run.steps:,}", note=f"of {planned:,}" if planned else ""))
    if (seconds := _number(run.result.get("seconds"))) is not None:
        found.append(Figure("Time", duration(seconds), note="of training"))
    if speed := _number(run.result.get("tokens_per_second")):
        found.append(Figure("Speed", figure(speed), note="tokens a second"))
    if peak := _number(run.result.get("peak_memory_bytes")):
        found.append(Figure("Memory", bytes_of(peak), note="at its peak"))
    return found


def _compared(kind: str, name: str, before: float | None, after: float) -> Figure:
    label = f"{kind} {_named(name) if _named(name).isupper() or name == 'f1' else _named(name).lower()}"
    if before is None:
        return Figure(label, _shown(name, after))
    upwards = is_higher_better(name)
    moved = after - before
    change = ""
    if _is_share(name):
        change = f"{100 * moved:+.1f} points"
    elif before:
        change = f"{moved / abs(before):+.0%}"
    good = None if upwards is None or moved == 0 or not math.isfinite(moved) else (moved > 0) == upwards
    return Figure(label, _shown(name, after), _shown(name, before), change.replace("-", "−").replace("%", " %"), good)


def _named(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " ").capitalize())


def _is_share(name: str) -> bool:
    return any(word in name for word in _SHARES)


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if _is_share(name) else figure(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
