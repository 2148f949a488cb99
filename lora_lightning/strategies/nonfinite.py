"""Steps whose loss or gradients have a NaN or an infinity in them: all processes find them together, and by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical
from lora_lightning.strategies.ranks import of_all_ranks

if TYPE_CHECKING:
    from lora_lightning.strategies.state import AdapterState


class NonFiniteError(AdapterError):
    """The loss or its gradients have a NaN or an infinity in them; the adapter is as it was before the step."""


class Watch:
    """The losses that an optimizer step is made of, looked at together with its gradients.

    Nothing waits for a device but the one question before each step, and processes exchange one number for it: a loss
    may be infinite on one of them alone, with gradients that are finite everywhere.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def note(self, loss: Tensor, trainer: pl.Trainer) -> None:
        """Note a loss before its backward pass; of several before one step, the first that is not finite counts."""
        value = loss.detach()
        if (
            _scaler(trainer) is not None and value.dtype is torch.float16
        ):  # multiplied by the scale, and that may be too large
            value = torch.where(value.isinf(), torch.zeros_like(value), value)
        value = value.float()
        self._loss = value if self._loss is None else torch.where(self._loss.isfinite(), value, self._loss)

    def stop_or_skip(self, state: AdapterState, optimizer: Optimizer, trainer: pl.Trainer, *, skip: bool) -> None:
        """Leave a step alone that is finite on all processes; else raise on all of them, or let it change nothing.

        Raises:
            NonFiniteError: With step, loss and the first parameter, unless the step is to be skipped.
        """
        problem = self._problem(state, optimizer, _scaler(trainer))
        if problem is None:
            return
        where = f"step {trainer.global_step}{problem}"
        if not skip:
            raise NonFiniteError(
                f"{where}. The adapter is as it was before this step. Lower the learning rate or the scale, or set "
                "on_nonfinite='skip' to pass over such steps"
            )
        rank_zero_warn(f"{where}; the step is skipped")
        state.skip(optimizer)

    def _problem(self, state: AdapterState, optimizer: Optimizer, scaler: Any) -> str | None:
        """What is not finite, and where, or None.

        A loss scaler passes over gradients that are not finite by itself, and lowers its scale. That is an error all
        the same where the loss is not finite, and where the scale is below 1 already.
        """
        loss, self._loss = self._loss, None
        device = state.strategy.root_device
        sound = torch.ones((), dtype=torch.bool, device=device)
        if loss is not None:
            sound = sound & loss.isfinite().all().to(device)
        if scaler is None or scaler.get_scale() < 1:
            sound = sound & state.are_finite(optimizer).to(device)
        if _agreed(sound):
            return None
        names = state.not_finite(state.stepped(optimizer, _trained(state)))
        return _told(of_all_ranks((None if loss is None else float(loss), names)))


def _told(everyone: list[tuple[float | None, list[str]]]) -> str:
    """Each process's loss and the names of its bad gradients, in one sentence."""
    rank, loss = next(((rank, loss) for rank, (loss, _) in enumerate(everyone) if not _finite(loss)), (0, None))
    on = f" on rank {rank}" if len(everyone) > 1 else ""
    told = "" if loss is None else f" (loss {loss:g}{on})"
    names = next((names for _, names in everyone if names), [])
    if not names:
        return f"{told}: the loss is not finite, though the gradients are"
    return f"{told}: gradients are not finite in {len(names)} trained tensors, first {names[0]}"


def _trained(state: AdapterState) -> dict[str, Any]:
    """All that trains, by canonical name: adapters, and what is beside an adapted network."""
    return {canonical(name): p for name, p in state.module.named_parameters() if p.requires_grad}


def _agreed(sound: Tensor) -> bool:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        number = sound.to(torch.int32)
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return bool(number)
    return bool(sound)


def _finite(value: float | None) -> bool:
    return value is None or abs(value) < float("inf")


def _scaler(trainer: pl.Trainer) -> Any:
    """The loss scaler that is in use, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
