"""Memory that a step frees on the CPU is there for the next one, instead of being given back and faulted in again."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

# mallopt(3): parameters by number, as glibc's malloc.h has them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what 64-bit glibc takes at most
_NEVER_TRIM = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for what is allocated next; once a process, and for all of it.

    glibc asks the system for large tensors anew and gives them back when they are freed, so that steps on the CPU pay
    for activations page by page: the system finds, clears and maps them, thousands a step. With this, blocks of up to
    32 MiB come out of memory that the process has already; what it needed at most, it keeps.

    Nothing is done outside Linux's glibc, or where the user has set one of ``MALLOC_…`` or ``GLIBC_TUNABLES``, or has
    put another allocator in glibc's place (``LD_PRELOAD``).

    Returns:
        Whether it was done.
    """
    said = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or said or os.environ.get("LD_PRELOAD"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
