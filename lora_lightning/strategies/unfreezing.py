"""Callbacks that freeze parts of a model and let them train later (``BaseFinetuning``): adapters may, the base not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import Optimizer

from lora_lightning.injection import freeze_rest
from lora_lightning.injection.names import canonical
from lora_lightning.injection.state import lora_parameters, weights_beside
from lora_lightning.optim import keep_trainable

if TYPE_CHECKING:
    from lora_lightning.strategies.state import AdapterState


def freeze_again(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Have what such callbacks freeze before training frozen now that it has adapters, which train from the start."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            callback.freeze_before_training(pl_module)


def count_held(optimizers: Sequence[Optimizer]) -> int:
    """How many parameters the optimizers have: another number says that somebody has added some."""
    return sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)


def keep_base(state: AdapterState, targets: Iterable[nn.Module]) -> None:
    """Where such a callback has let whole layers train and given them to an optimizer, leave it their adapters.

    Args:
        state: Knows how many parameters the optimizers had when they were looked at last.
        targets: The modules below which adapters are.
    """
    if state.held is None or count_held(state.strategy.optimizers) == state.held:
        return
    for target in targets:
        freeze_rest(target)
        keep_trainable(state.strategy.optimizers, lora_parameters(target), weights_beside(target))
    state.held = count_held(state.strategy.optimizers)


def train_as_saved(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]], module: nn.Module) -> None:
    """Let train what trained when a checkpoint was written, though it has been frozen again at the start of this run.

    Such callbacks put groups of parameters back into the optimizers, the base's too, and leave them frozen.

    Args:
        optimizers: Those of this run.
        saved: Their states by name in the checkpoint.
        module: The LightningModule.
    """
    names = {name for states in saved for group in states["param_groups"] for name in group["params"]}
    asleep = [p for name, p in module.named_parameters() if not p.requires_grad and canonical(name) in names]
    held = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for parameter in asleep:
        parameter.requires_grad_(True)
    if asleep or any(not p.requires_grad for p in held.values()):
        keep_trainable(list(optimizers), lora_parameters(module), weights_beside(module))
