"""Why a fit ended before its last step though nothing failed."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer


def ended_by(trainer: Trainer | None) -> str | None:
    """The reason in words, or None where a fit went through, or failed.

    Whoever stops a fit by ``trainer.should_stop`` may say why in an attribute ``ended_by``; Lightning's own callbacks
    do not, and are known here.
    """
    if trainer is None or not trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if reason := getattr(callback, "ended_by", None):
            return str(reason)
    if any(isinstance(each, Timer) and (each.time_remaining() or 0.0) < 0 for each in callbacks):
        return f"max_time at step {trainer.global_step}"
    if any(isinstance(each, EarlyStopping) and _has_stopped(each) for each in callbacks):
        return "early stopping"
    return f"a callback at step {trainer.global_step}"


def _has_stopped(callback: EarlyStopping) -> bool:
    """Whether it is this one that has stopped the fit; Lightning before 2.6 does not say."""
    reason = getattr(callback, "stopping_reason", None)
    return reason is None or reason.name != "NOT_STOPPED"
