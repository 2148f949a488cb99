"""A job's side of successive halving: it validates at each rung, reports, and goes on or stops as it is told."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.reports.recorder import write_json
from lora_lightning.sweeps.packed.baton import Player
from lora_lightning.sweeps.packed.ending import end_if_asked
from lora_lightning.sweeps.packed.halving import Place, Plan
from lora_lightning.sweeps.packed.requests import AtRung

NAME = "rungs.json"
"""In a job's folder: what it has reported so far, for a sweep that is started again."""


class Rungs(pl.Callback):
    """Compares a job with others at each rung, and ends its fit where it is among the worse.

    A rung that falls between two validations brings one of its own, at which a job that goes on writes no checkpoint.

    Args:
        player: Through which the job reports.
        plan: Where the rungs are.
        metric: What jobs are compared by: a metric of a validation.
        folder: The job's folder.
        among: Who it is compared with, in a few signs: what they all have in common.

    Attributes:
        ended_by: Why the fit has ended before its last step, or None.
    """

    def __init__(
        self, player: Player, plan: Plan, metric: str | None, folder: str | os.PathLike[str], among: str = ""
    ) -> None:
        super().__init__()
        self.ended_by: str | None = None
        self._player, self._plan, self._metric, self._path = player, plan, metric, Path(folder) / NAME
        self._among = among
        self._steps: list[int] = []
        self._reported: list[float] = []
        self._decided = 0
        self._brought = False  # whether the validation at hand is there for a rung alone

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out where the rungs are, and have a validation at each.

        Raises:
            LoraConfigError: Nobody knows how many steps the run has, or it has no validation.
        """
        loaded = trainer.val_dataloaders is not None
        if not trainer.enable_validation or (loaded and not any(trainer.num_val_batches)):
            raise LoraConfigError(
                "sweep.halving compares jobs by a validation, and this one has none: give the data validation rows "
                f"(data.val_rows) and leave trainer.limit_val_batches above 0, got {trainer.limit_val_batches}"
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise LoraConfigError("sweep.halving needs to know how many steps a job has: set trainer.max_steps")
        self._steps = self._plan.rungs(int(steps))
        if not self._steps:
            print(f"sweep.halving: {int(steps)} steps are too few for a rung, so this job goes to its end")
        loop: Any = trainer.fit_loop.epoch_loop
        loop._should_check_val_fx = functools.partial(self._is_due, trainer, loop._should_check_val_fx)
        if len(self._reported) > self._decided:  # it was ended while it waited
            self._stand(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report where a rung has been reached."""
        while trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_at_rung(trainer):
            self._reported.append(self._value(trainer))
            write_json(self._path, {"among": self._among, "values": self._reported})
            self._stand(trainer)
            if trainer.should_stop or self._decided < len(self._reported):
                return
            if self._brought:
                _leave_unsaved(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the loop as it was."""
        vars(trainer.fit_loop.epoch_loop).pop("_should_check_val_fx", None)

    def state_dict(self) -> dict[str, Any]:
        """What has been reported, and how much of that was decided on."""
        return {"reported": list(self._reported), "decided": self._decided}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that."""
        self._reported, self._decided = list(state_dict["reported"]), state_dict["decided"]

    def _is_due(self, trainer: pl.Trainer, due: Callable[[Any], bool], fetcher: Any) -> bool:
        meant = due(fetcher)
        at_rung = not trainer.fit_loop.epoch_loop._should_accumulate() and self._is_at_rung(trainer)
        self._brought = at_rung and not meant
        return meant or at_rung

    def _is_at_rung(self, trainer: pl.Trainer) -> bool:
        ahead = self._steps[len(self._reported) :]
        return bool(ahead) and ahead[0] <= trainer.global_step

    def _stand(self, trainer: pl.Trainer) -> None:
        """Wait for the others, and for what is decided; nothing is where the job is told to end, and asked later."""
        place: Place | None = self._player.hand_in(AtRung(self._decided, self._reported[self._decided]))
        if place is None:
            end_if_asked(self._player, trainer)
            return
        self._decided += 1
        if not place.stays:
            self.ended_by = f"halving at step {trainer.global_step}, place {place.place} of {place.of}"
            trainer.should_stop = True

    def _value(self, trainer: pl.Trainer) -> float:
        metrics, name = trainer.callback_metrics, self._metric or ""
        for each in (name, f"val_{name}"):
            if each in metrics:
                return float(metrics[each])
        known = [key for key in metrics if key.startswith("val_")]
        raise LoraConfigError(
            f"sweep.halving compares jobs by optimized_metric={self._metric!r}, which a validation does not measure"
            f"{did_you_mean(name, known)}. Measured are {', '.join(known) or 'none'}"
        )


def _leave_unsaved(trainer: pl.Trainer) -> None:
    """Let checkpoint callbacks, which come last, take this step for one that they have saved."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step
