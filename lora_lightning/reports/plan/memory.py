"""What a training takes in memory on one device, whether it fits, and the largest batch that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_lightning.reports.plan.setting import Setting
from lora_lightning.reports.plan.spread import Held
from lora_lightning.reports.plan.step import StepCost
from lora_lightning.tasks.free_memory import free_memory

LEFT_FREE = 0.1
"""This share of a device's memory is left free: for what allocators lose, and for whoever else needs some."""
HOLES = {"cpu": 0.4, "cuda": 0.1}
"""Memory that lies between the tensors of a step, for each byte of them. On the CPU, where
memory that was freed is kept (:mod:`lora_lightning.strategies.allocator`), it is set by the peaks that
``benchmarks/plan.py`` measures. On a GPU it is assumed.

Activations that are computed again come and go one block after another, and what lives on between them keeps the C
library from joining the places where they lay. So on the CPU their holes are those of a step that keeps them."""
CUDA_LIBRARIES = 500 * 10**6
"""What CUDA itself and the libraries' workspaces take of a GPU, about."""
_MOST_ROWS = 2**16


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Attributes:
        weights: Of the frozen base.
        adapter: Of what trains.
        gradients: Of what trains.
        optimizer: What the optimizer keeps for it.
        gathered: Parts of a sharded base that are whole for a while.
        activations: What forward keeps for backward; None where it is not known.
        loss: What the output layer and the loss take, for a moment; None where it is not known.
        backward: What backward takes besides what forward kept, for a moment; None where it is not known.
        holes: What the allocator leaves between the tensors of a step.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float | None = None
    loss: float | None = None
    backward: float | None = None
    holes: float = 0.0

    @property
    def total(self) -> float:
        """The most at once, without what libraries take; loss and backward come one after the other."""
        throughout = self.weights + self.adapter + self.gradients + self.optimizer + self.gathered
        return throughout + (self.activations or 0) + max(self.loss or 0, self.backward or 0) + self.holes

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and the total."""
        return asdict(self) | {"total": self.total}


def memory(held: Held, cost: StepCost | None, rows: int, *, dequantised: float = 0.0, device: str = "cpu") -> Memory:
    """The memory of a training with so many rows in a batch."""
    there = Memory(held.weights, held.adapter, held.gradients, held.optimizer, held.gathered)
    if cost is None:
        return there
    step = cost.of(rows)
    loss, backward = step.loss, step.backward + dequantised
    laid_out = cost.laid_out(rows) if device == "cpu" else step.kept
    holes = HOLES[device] * (laid_out + max(loss, backward))
    return replace(there, activations=step.kept, loss=loss, backward=backward, holes=holes)


def available(setting: Setting) -> int | None:
    """Bytes for one device: those that were given; else of this machine's GPU, or a part of what main memory has left.

    Returns:
        None where it is a GPU that is planned for and there is none here.
    """
    if setting.memory is not None:
        return setting.memory
    if setting.device == "cpu":
        return free_memory(torch.device("cpu")) // setting.neighbours
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def usable(available: int, setting: Setting) -> float:
    """What may be planned on of that."""
    libraries = CUDA_LIBRARIES if setting.device == "cuda" else 0
    return available * (1 - LEFT_FREE) - libraries


def largest_batch(with_rows: Callable[[int], Memory], room: float) -> int:
    """The most rows of a batch that fit into so many bytes; 0 where one does not.

    Args:
        with_rows: The memory of a training with so many rows.
        room: The bytes.
    """

    def fits(rows: int) -> bool:
        return with_rows(rows).total <= room

    low, high = 0, 1
    while high <= _MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
