"""Locks of folders that the system lets go of when their holder is gone, however it went."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lora_lightning.errors import LoraConfigError

try:
    import fcntl
except ImportError:  # Windows, where a sweep cannot run, but may be read
    fcntl = None  # type: ignore[assignment]


def lock(path: Path, content: str) -> int | None:
    """Take a lock, without waiting.

    The lock belongs to the open file: whoever inherits the descriptor holds it too, and it is free once all of them
    have closed it or ended.

    Args:
        path: The lock's file, made if need be. It stays when the lock is let go: another may be waiting for it.
        content: What is written into it, for those who find it held: who holds it.

    Returns:
        The descriptor, to be closed by the caller; None where somebody else holds the lock.

    Raises:
        LoraConfigError: This system has no such locks.
    """
    if fcntl is None:
        raise LoraConfigError("A sweep needs locks that the system lets go of, which Windows does not have: use WSL")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    note(descriptor, content)
    return descriptor


def note(descriptor: int, content: str) -> None:
    """Say in a lock's file who holds it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content.encode(), 0)


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock at this moment."""
    if fcntl is None or not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> str:
    """What the holder of a lock has said of itself, or an empty string."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""
