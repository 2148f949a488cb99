"""What could not be written: one error for people, on every process, so that none waits for one that is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lora_lightning.errors import AdapterError

T = TypeVar("T")


def first_process_writes(path: str | os.PathLike[str], write: Callable[[], T]) -> T | None:
    """Let one process write, and let all fail with it: else the others would wait for one that is gone.

    Args:
        path: What is to be written, to be named in a message.
        write: Called on the first process of a torch process group. All of them call this.

    Returns:
        What ``write`` gave on the first process, None on the others.

    Raises:
        AdapterError: If it cannot be written, on every process.
    """
    with failing_together(path):
        return write() if not distributed() or dist.get_rank() == 0 else None


@contextlib.contextmanager
def failing_together(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise on every process what has failed on any of them; all of them enter and leave it."""
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:  # of whatever kind: the others wait for this process
        failed = error
    _raise_together(Path(path), failed)


def _raise_together(path: Path, failed: BaseException | None) -> None:
    told: list[Any] = [None if failed is None else unwritten(path, failed).args[0]]
    if distributed():
        mine, told = told[0], [None] * dist.get_world_size()
        dist.all_gather_object(told, mine)
    if failed is not None and not isinstance(failed, (OSError, RuntimeError)):
        raise failed
    if message := next((each for each in told if each is not None), None):
        raise AdapterError(message) from failed


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BufferedWriter]:
    """A file to write that takes the place of ``path`` once it is on the disk; nothing of it is left if that fails."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that is there whole under its name afterwards, or not at all.

    Raises:
        AdapterError: If something is there already, or it cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise where something is that is about to be written, before work is done for it.

    Raises:
        AdapterError: If it is.
    """
    if os.path.lexists(path):
        raise AdapterError(f"{path} is there already, and nothing is written over: name another folder")


def distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwritten(path: Path, error: BaseException, obj: Any = None) -> AdapterError:
    """The error that a path could not be written, or that same one."""
    if isinstance(error, AdapterError):
        return error
    wanted = f" About {_bytes_of(obj):,} bytes were to be written" if obj is not None else " It was to be written"
    with contextlib.suppress(OSError):
        wanted += f", {shutil.disk_usage(path.parent).free:,} bytes are free there"
    reason = getattr(error, "strerror", None) or str(error)
    return AdapterError(
        f"{path} could not be written: {reason}.{wanted}. What was saved earlier is whole. Make "
        "room or name another folder, then go on from the last checkpoint"
    )


def _bytes_of(obj: Any) -> int:
    if isinstance(obj, Tensor):
        return obj.untyped_storage().nbytes()
    items = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return sum(map(_bytes_of, items))
