"""How much to do at once, by the memory at hand."""

from __future__ import annotations

from pathlib import Path

import torch

# What one chunk takes at most. Each chunk reads the whole weight, so that few rows at once are slow: of 1,024 rows of
# 49,152 columns on two cores, 256 at once took 1.15 and 128 at once 1.36 of the time that all at once took. On a GPU
# products of a hundred thousand columns are at full speed from about a thousand rows on.
MOST_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
SHARE_OF_FREE = 8
"""A chunk takes no more than one part in so many of the memory that is free."""


def chunk_rows(rows: int, row_bytes: int, device: torch.device) -> int:
    """So many rows at once that they fit well, all chunks being about as long.

    Args:
        rows: How many there are; may be 0.
        row_bytes: What each takes while it is worked on.
        device: Where.

    Returns:
        At least 1, at most ``rows``.

    >>> chunk_rows(10, 1, torch.device("cpu"))
    10
    """
    rows = max(rows, 1)
    budget = min(MOST_BYTES.get(device.type, MOST_BYTES["cpu"]), free_bytes(device) // SHARE_OF_FREE)
    chunks = -(-rows // max(1, budget // row_bytes))
    return -(-rows // chunks)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that could be had now; where that cannot be known, enough for the largest chunk."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return MOST_BYTES["cpu"] * SHARE_OF_FREE
