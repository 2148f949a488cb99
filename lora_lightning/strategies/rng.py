"""The state of the random number generators, as tensors and numbers that a checkpoint may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lora_lightning.strategies.ranks import of_all_ranks


def capture() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and each CUDA device's generator in this process."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # the global state is what is asked
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the generators to a state that :func:`capture` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def gather() -> list[dict[str, Any]]:
    """Every rank's states in order of rank, on every rank; call it on all of them."""
    return of_all_ranks(capture())


def of_rank(states: list[dict[str, Any]] | None, rank: int) -> dict[str, Any] | None:
    """A rank's states, or None where the checkpoint comes from another number of processes."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return states[rank] if states and len(states) == world else None
