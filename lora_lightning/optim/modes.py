"""Optimizers that train at one point and average at another (schedule-free ones), switched as Lightning goes along."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError
from lora_lightning.optim.trainable_only import optimizers_in


def follow_modes(trainer: pl.Trainer, configured: Any) -> None:
    """Have the optimizers among what ``configure_optimizers`` returned that have modes follow a trainer's.

    Such are those with ``train()`` and ``eval()``: between the two the parameters themselves change.

    Raises:
        LoraConfigError: If DeepSpeed keeps the values that they would have to change.
    """
    leave_modes(trainer)
    optimizers = [each for each in optimizers_in(configured) if _has_modes(each)]
    if not optimizers:
        return
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise LoraConfigError(
            f"{type(optimizers[0]).__name__} moves parameters between training and validation, and DeepSpeed keeps "
            "their values in its engine: take strategy='ddp' or ModelParallelStrategy, or another optimizer"
        )
    # First, so that whatever other callbacks read or write at a stage is of the right mode.
    trainer.callbacks.insert(0, FollowModes(optimizers))  # type: ignore[attr-defined]
    vars(trainer)["save_checkpoint"] = functools.partial(_save_averaged, optimizers, trainer.save_checkpoint)


def leave_modes(trainer: pl.Trainer) -> None:
    """Take off what :func:`follow_modes` has put on."""
    trainer.callbacks[:] = [each for each in trainer.callbacks if not isinstance(each, FollowModes)]  # type: ignore[attr-defined]
    save = vars(trainer).get("save_checkpoint")
    if isinstance(save, functools.partial) and save.func is _save_averaged:
        del vars(trainer)["save_checkpoint"]


class FollowModes(pl.Callback):
    """Shows the average wherever nothing is trained: in validations, and from the end of training on.

    Args:
        optimizers: Those with ``train()`` and ``eval()``.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__()
        self._optimizers: Sequence[Any] = optimizers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """To the point that is trained; a checkpoint has put the average here."""
        self._switch("train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """To the average."""
        self._switch("eval")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back, where training goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._switch("train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """To the average, which is what has been learnt."""
        self._switch("eval")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """To the average, of which a last adapter may be written."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self._optimizers:
            getattr(optimizer, mode)()


@contextlib.contextmanager
def averaged(optimizers: Sequence[Any]) -> Iterator[None]:
    """The average inside the ``with`` block, whatever is there outside it."""
    training = [each for each in optimizers if any(group.get("train_mode", True) for group in each.param_groups)]
    for optimizer in training:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in training:
            optimizer.train()


def _save_averaged(optimizers: Sequence[Any], save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with averaged(optimizers):
        save(*args, **kwargs)


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
