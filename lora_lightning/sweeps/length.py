"""How long a job is: its optimizer steps and validation batches, from the settings of its Trainer alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Length(NamedTuple):
    """What a run does at most; early stopping ends it sooner."""

    steps: int
    val_batches: int


def length(trainer: Mapping[str, Any], batches: int | None, val_batches: int) -> Length | None:
    """The steps of a run, and the validation batches before, between and behind them.

    Args:
        trainer: The settings of Lightning's Trainer; ``limit_train_batches`` is not asked, see ``batches``.
        batches: Training batches of an epoch, as far as the run sees them; None where nobody knows, as of a stream.
        val_batches: Batches of a whole validation.

    Returns:
        None where nobody can know.
    """
    accumulate = trainer.get("accumulate_grad_batches") or 1
    max_steps, max_epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    if max_epochs is None:
        max_epochs = -1 if max_steps >= 0 else 1000  # Lightning's own
    limits = [max_steps] if max_steps >= 0 else []
    if batches is not None and max_epochs >= 0:
        limits.append(max_epochs * math.ceil(batches / accumulate))
    if not limits:
        return None
    steps, whole = min(limits), _limited(val_batches, trainer.get("limit_val_batches"))
    sanity = trainer.get("num_sanity_val_steps", 2)
    before = whole if sanity == -1 else min(sanity, whole)
    return Length(steps, before + whole * _validations(trainer, batches, steps, accumulate))


def _validations(trainer: Mapping[str, Any], batches: int | None, steps: int, accumulate: int) -> int:
    """Those in the fit, and the one behind it where the last step has had none."""
    interval, every = trainer.get("val_check_interval") or 1.0, trainer.get("check_val_every_n_epoch", 1)
    if every is None or batches is None:  # counted through all epochs
        seen = steps * accumulate if batches is None else _batches_seen(steps, batches, accumulate)
        if not isinstance(interval, int):
            return 1
        return seen // interval + (seen % interval != 0)
    due = interval if isinstance(interval, int) else max(1, int(batches * interval))
    epochs, rest = divmod(steps, math.ceil(batches / accumulate))
    count = epochs // every * (batches // due)
    validated = epochs % every == 0 and batches % due == 0
    if rest:
        counts = (epochs + 1) % every == 0
        count += rest * accumulate // due if counts else 0
        validated = counts and rest * accumulate % due == 0
    return count + (not validated)


def _batches_seen(steps: int, batches: int, accumulate: int) -> int:
    epochs, rest = divmod(steps, math.ceil(batches / accumulate))
    return epochs * batches + rest * accumulate


def _limited(count: int, limit: float | None) -> int:
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else int(count * limit)
