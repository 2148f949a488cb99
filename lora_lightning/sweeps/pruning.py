"""Pruning: a job of a search reports how it validates, and ends where others did better at the same step."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.sweeps.study import PRUNED, PRUNERS, Note, made_of, open_storage


class PruneTrial(Callback):
    """Reports each validation to the study of the search, and ends the fit when the trial is hopeless.

    One process reports and decides, and all of them stop. A fit that goes on after an interruption does not report a
    step again.

    Args:
        note: Which trial of which study this is, and what decides.

    Attributes:
        ended_by: In words, when it has ended the fit; else None.
    """

    def __init__(self, note: Note) -> None:
        self.ended_by: str | None = None
        self._note = note

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and stop where the pruner says so."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        hopeless = self._is_hopeless(trainer) if trainer.is_global_zero else False
        if trainer.strategy.reduce_boolean_decision(hopeless, all=False):
            trainer.should_stop = True
            self.ended_by = f"pruned at step {trainer.global_step}"

    def _is_hopeless(self, trainer: Trainer) -> bool:
        import optuna

        note, step, value = self._note, trainer.global_step, self._value(trainer)
        storage = open_storage(Path(note.study))
        trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(note.name), note.trial)
        if step not in storage.get_trial(trial).intermediate_values:
            storage.set_trial_intermediate_value(trial, step, value)
        if step >= trainer.estimated_stepping_batches:
            return False  # there is nothing left to save
        pruner = made_of(note.pruner, PRUNERS)
        study = optuna.load_study(study_name=note.name, storage=storage, pruner=pruner)
        hopeless = not math.isfinite(value) or pruner.prune(study, storage.get_trial(trial))
        if hopeless:
            storage.set_trial_user_attr(trial, PRUNED, step)
        return hopeless

    def _value(self, trainer: Trainer) -> float:
        monitor, measured = self._note.monitor, trainer.callback_metrics
        if monitor not in measured:
            raise LoraConfigError(
                f"hydra.sweeper.monitor={monitor}: pruning goes by it, and validation does not measure it"
                f"{did_you_mean(monitor, measured)}. Measured are {', '.join(measured) or 'no metrics'}"
            )
        return float(measured[monitor])


def pruning_in(folder: Path) -> list[Callback]:
    """The callback of a job that a search may prune, by what the sweeper has left in the job's folder; or none."""
    note = Note.read(folder)
    return [] if note is None else [PruneTrial(note)]
