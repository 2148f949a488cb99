"""A training that runs out of memory ends with what to set, as a command to paste."""

from __future__ import annotations

import contextlib
import gc
import shlex
import sys
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig

from lora_lightning.cli.overrides import program
from lora_lightning.cli.run_folder import is_first_process
from lora_lightning.cli.told import CommandError

_ON_CPU = ("can't allocate memory", "not enough memory", "cannot allocate memory")
"""What torch's allocator for main memory says on Linux, Windows, macOS."""
_STATIC = (
    "data.batch_size=1 trainer.accumulate_grad_batches=<rows a step> model.gradient_checkpointing=true, "
    "a shorter data.max_length"
)


@contextlib.contextmanager
def remedied(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[None]:
    """Tell what would take less memory, by the plan of a run, where there was not enough of it.

    Args:
        cfg: The run's configuration.
        overrides: The settings that were given for it.

    Raises:
        CommandError: In place of an error for want of memory, in a run's first process.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not is_first_process():
            raise
        first = (str(error).splitlines() or [""])[0]
        error.__traceback__ = None  # its frames hold the tensors that were alive
        gc.collect()
        message, command = _told(cfg, overrides)
        raise CommandError(
            f"The memory did not suffice ({type(error).__name__}: {first}).\n{message}", command
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one for want of memory, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _ON_CPU)


def _told(cfg: DictConfig, overrides: Sequence[str]) -> tuple[str, str | None]:
    try:
        from lora_lightning.cli.planning import setting_of
        from lora_lightning.reports.plan.remedy import listed, remedies

        found = remedies(setting_of(cfg))
    except Exception as error:  # there may be no memory left for that, or no plan for this model
        return f"What takes less: {_STATIC} (no plan could be made: {type(error).__name__})", None
    names = {word.partition("=")[0] for word in found[0].settings.split()}
    kept = [word for word in overrides if word.partition("=")[0] not in names]
    words = [program(sys.argv[0]), *(shlex.quote(word) for word in kept), found[0].settings]
    return listed(found), " ".join(words)
