"""Random numbers that an uninterrupted run draws and a resumed one does not, or the other way about: undone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lora_lightning.strategies import rng
from lora_lightning.strategies.position import resume_position
from lora_lightning.strategies.state import AdapterState


def before_first_iterator(state: AdapterState) -> None:
    """Restore before the first iterator is made, which draws as the next epoch's would have."""
    if state.rng is not None:
        rng.restore(state.rng)


def at_train_start(trainer: pl.Trainer, state: AdapterState) -> None:
    """Within an epoch, an uninterrupted run would not have made an iterator here: undo what that has drawn."""
    resume_position(trainer, state.rng)
    within = trainer.fit_loop.restarted_mid_epoch and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    if state.rng is not None and within:
        rng.restore(state.rng)
    state.rng = None


class Validation:
    """The random states before a validation, which a run that is resumed at that batch would not make."""

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None

    def note(self, trainer: pl.Trainer) -> None:
        """Note them after a batch, where a validation follows."""
        loop = trainer.fit_loop
        due = loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self._before = rng.capture() if due else None

    def undo(self, trainer: pl.Trainer) -> None:
        """Let training go on as if nothing had been drawn by the validation."""
        if self._before is not None and not trainer.sanity_checking:
            rng.restore(self._before)
            self._before = None
