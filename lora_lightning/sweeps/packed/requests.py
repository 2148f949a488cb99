"""What a job hands in and waits for an answer to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Score:
    """A batch to be scored under the job's adapter; the answer is a ``SlotLoss``, or None: the job is to do it itself.

    Attributes:
        model: The job's model.
        batch: What a step of it is about.
        train: Whether the gradients are asked for.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    train: bool
    autocast: tuple[bool, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.batch["input_ids"].device

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(self.batch["input_ids"])

    @contextlib.contextmanager
    def as_handed_in(self) -> Iterator[None]:
        """Compute in the modes that were on in the job's thread."""
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype, enabled):
            yield


@dataclass
class AtRung:
    """The job has come to a rung of successive halving; the answer is its `Place`, or None: it is to end anyway.

    Attributes:
        rung: Which one, counted from 0.
        value: Its metric there.
    """

    rung: int
    value: float
