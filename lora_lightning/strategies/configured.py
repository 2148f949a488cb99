"""What ``configure_optimizers`` of a LightningModule gives, made to hold what trains and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lora_lightning.injection import freeze_rest, lora_parameters
from lora_lightning.injection.state import adapter_tensors, weights_beside
from lora_lightning.optim import fuse, keep_trainable
from lora_lightning.optim.modes import follow_modes
from lora_lightning.strategies import state_of
from lora_lightning.strategies.replaced import check_there


def configure(
    pl_module: pl.LightningModule, target: nn.Module, tensors: Collection[str], call: Callable[[], Any]
) -> Any:
    """Have a module configure its optimizers.

    Args:
        pl_module: The module.
        target: The part of it below which the adapter is.
        tensors: Names of the tensors that injection gave it.
        call: Runs its own ``configure_optimizers``.

    Returns:
        What that gave, the same objects.

    Raises:
        LoraConfigError: If tensors of the adapter are gone, or no optimizer has them.
    """
    check_there(tensors, adapter_tensors(target).keys(), pl_module.trainer)
    freeze_rest(target)  # parallel plans may have made parameters trainable since
    trained = lora_parameters(target).keys()
    configured = call()
    if lora_parameters(target).keys() != trained:  # LoRA-FA freezes A
        state_of(pl_module.trainer).narrowed()
    follow_modes(pl_module.trainer, configured)
    return fuse(keep_trainable(configured, lora_parameters(target), weights_beside(target)), pl_module)
