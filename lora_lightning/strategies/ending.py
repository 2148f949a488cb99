"""The end of a process of several: it leaves its group before Python is taken down."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys

import torch.distributed as dist


def leave_group_at_exit() -> None:
    """See to it that a process which has done its work ends as one that has.

    Threads of gloo that outlive the interpreter abort the process now and then (``terminate called without an active
    exception``, pytorch/pytorch#190489), and a run that has succeeded looks like one that has failed. Lightning leaves
    groups of NCCL by itself, and no others.
    """
    if dist.is_available() and dist.is_initialized():
        _register()


@functools.cache
def _register() -> None:
    atexit.register(_leave_group)


def _leave_group() -> None:
    # After an exception that nobody caught, others may wait in vain for this process: it is not to wait for them.
    failed = hasattr(sys, "last_value")
    if dist.is_initialized() and not failed:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
