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
# Imported by others wherever they are installed: what they miss on this machine then says nothing about a run.
_IMPORTED = ("torchao", "bitsandbytes", "torch.utils._pytree")
_MESSAGES = ("💡 Tip:", "Loading `train_dataloader` to estimate")


def quieten_imports() -> None:
    """Drop what packages that nobody asked for say while they are imported, in this process only."""
    for name in _IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)


def quieten(*, bars: bool = True) -> None:
    """Drop some of Lightning's messages, in this process only; without ``bars``, those of loading a model as well."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if logging.getLogger().hasHandlers():
        logging.getLogger("lightning").handlers.clear()  # Lightning's own, beside which everything is shown twice
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_PASSING)
    if not bars:
        from transformers.utils import logging as transformers_logging  # which takes seconds, where `told` needs none

        transformers_logging.disable_progress_bar()


class _Passing(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_MESSAGES)


_PASSING = _Passing()
