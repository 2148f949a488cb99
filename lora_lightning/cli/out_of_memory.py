"""A training that runs out of memory ends with what to set, as a command to paste."""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from lora_lightning.cli.again import command_again
from lora_lightning.cli.candidates import Candidates
from lora_lightning.cli.run_folder import is_first_process
from lora_lightning.cli.told import CommandError

_WORDS = (
    "out of memory",  # of a GPU: torch's allocator, CUDA itself, NCCL
    "status_alloc_failed",  # cuBLAS, cuDNN
    "can't allocate memory",  # of the machine: Linux, Windows, macOS
    "not enough memory",
    "cannot allocate memory",
)
_STATIC = (
    "data.batch_size=1 trainer.accumulate_grad_batches=<rows a step> model.gradient_checkpointing=true, "
    "a shorter data.max_length"
)


@contextlib.contextmanager
def remedied(cfg: DictConfig, overrides: Sequence[str], data: object = None) -> Iterator[None]:
    """Tell what would take less memory, by the plan of a run, where there was not enough of it.

    Args:
        cfg: The run's configuration.
        overrides: The settings that were given for it.
        data: Its data module: by the lengths of its rows, packing is among what is told.

    Raises:
        CommandError: In place of an error for want of memory. With a command to paste in a run's first process; in the
            others, any of which may be the one that had too little, in a line.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        short = f"The memory did not suffice ({type(error).__name__}: {first})."
        if not is_first_process():
            raise CommandError(f"{short} What takes less: {_STATIC}") from error
        error.__traceback__ = None  # its frames hold the tensors that were alive
        gc.collect()
        message, command = _told(cfg, overrides, data)
        raise CommandError(f"{short}\n{message}", command) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one for want of memory, of a GPU or of the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of a process that could not be started, say
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def _told(cfg: DictConfig, overrides: Sequence[str], data: object) -> tuple[str, str | None]:
    try:
        from lora_lightning.cli.planning import setting_of
        from lora_lightning.reports.plan.remedy import listed, remedies

        keys = Candidates(cfg, ())  # a data module of one's own need not know a batch size
        every = remedies(setting_of(cfg), _lengths(data))
        found = [each for each in every if all(key in keys for key in _keys(each.settings))]
    except Exception as error:  # there may be no memory left for that, or no plan for this model
        return f"What takes less: {_STATIC} (no plan could be made: {type(error).__name__})", None
    return listed(found), _command(overrides, found[0].settings) if found else None


def _lengths(data: Any) -> Sequence[int] | None:
    """Of the rows for training, in tokens; None where they are packed already, or a stream's, or another's."""
    try:
        return None if data.packing else data.loaded.train.lengths()
    except (AttributeError, RuntimeError):
        return None


def _command(overrides: Sequence[str], settings: str) -> str:
    new = _keys(settings)
    kept = [word for word in overrides if word.lstrip("+").partition("=")[0] not in new]
    return command_again([*kept, *settings.split()])


def _keys(settings: str) -> list[str]:
    return [word.partition("=")[0] for word in settings.split()]
