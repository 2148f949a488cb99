"""A job ends where its process is told to: between two steps, with everything saved."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_lightning.stopping import SaveOnSignal
from lora_lightning.sweeps.packed.baton import Player


def end_if_asked(player: Player, trainer: pl.Trainer) -> None:
    """Have a job's fit save and end, where the process has got a signal; outside of a fit there is nothing to save.

    Raises:
        SIGTERMException: There is nothing to save, or nobody who would.
    """
    if not (number := player.signal):
        return
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    saving = next((each for each in callbacks if isinstance(each, SaveOnSignal)), None)
    if saving is None or trainer.state.fn != "fit":
        raise SIGTERMException(128 + number)
    saving.note(number)
