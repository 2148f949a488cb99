"""Keeps what says nothing about a run off the screen, so that what does can be seen."""

from __future__ import annotations

import logging
import warnings

# Known and meant: Hydra writes into the run's folder first; the others are between Lightning and its own parts.
_WARNINGS = (
    r"Experiment logs directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '.*_dataloader' does not have many workers",
)
_MESSAGES = ("💡 Tip:", "Loading `train_dataloader` to estimate")


def quieten() -> None:
    """Drop some of Lightning's messages, in this process only."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_PASSING)


class _Passing(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_MESSAGES)


_PASSING = _Passing()
