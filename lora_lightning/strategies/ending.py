"""The end of a process of several: it leaves its group before Python is taken down, and waits for nobody."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading

import torch.distributed as dist

_PATIENCE = 2.0  # seconds; a group in which nothing is pending is left in milliseconds


def leave_group_at_exit() -> None:
    """See to it that a process which has done its work ends as one that has, and one that has failed ends at all.

    Threads of gloo that outlive the interpreter abort the process now and then (``terminate called without an active
    exception``, pytorch/pytorch#190489), and a run that has succeeded looks like one that has failed. Lightning leaves
    groups of NCCL by itself, and no others. A group in which something is pending cannot be left before the others
    have come or gone; for a process that ends on its own, by whichever exception, they may never come: its status is
    to be seen all the same.
    """
    if dist.is_available() and dist.is_initialized():
        _register()


@functools.cache
def _register() -> None:
    ending = threading.Event()
    # Begun now: where Python ends, newer versions begin no thread. What it still waits for ends with the process.
    leaving = threading.Thread(target=_leave_group, args=(ending,), name="leave_group_at_exit", daemon=True)
    leaving.start()
    atexit.register(_end, ending, leaving)


def _end(ending: threading.Event, leaving: threading.Thread) -> None:
    ending.set()
    leaving.join(_PATIENCE)


def _leave_group(ending: threading.Event) -> None:
    ending.wait()
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
