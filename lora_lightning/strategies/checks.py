"""What would fail in silence, told: refused before anything is injected, or warned of at the first step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.layers import LoraLayer


def check_trainer(trainer: Any) -> None:
    """See that a trainer can work with the callback.

    Raises:
        LoraConfigError: If it is the other package's, or a Hydra multirun would train wrong experiments.
    """
    if not isinstance(trainer, pl.Trainer):
        raise LoraConfigError(
            f"this Trainer comes from {type(trainer).__module__.partition('.')[0]}, LoraCallback from "
            "lightning.pytorch, and the two do not mix: write `from lightning.pytorch import Trainer` (and "
            "LightningModule)"
        )
    if trainer.world_size > 1 and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and _multirun():
        raise LoraConfigError(
            f"a Hydra multirun with strategy {type(trainer.strategy).__name__} on {trainer.num_devices} devices: each "
            "further process would run the whole sweep again, and processes would train different experiments together "
            "without a word. Start each run by itself (one command for each job, without -m), or with a launcher that "
            "gives every job a process of its own"
        )


def check_first_step(layers: Mapping[str, LoraLayer], named: Mapping[str, nn.Parameter], unused: Sequence[str]) -> None:
    """Warn of what the first optimizer step shows to be idle.

    Args:
        layers: Adapted layers by name.
        named: The adapter's parameters that this step is to change.
        unused: Names of those that got no gradient.
    """
    if unused:
        rank_zero_warn(
            f"{len(unused)} of {len(named)} adapter tensors got no gradient in the first step, first {unused[0]}: "
            "their layers took no part in the loss, or something between cuts gradients off (reentrant activation "
            "checkpointing does, below frozen embeddings: use_reentrant=False). They are saved as they began"
        )
    dropping = {name: layer for name, layer in layers.items() if layer.lora_dropout}
    if asleep := [name for name, layer in dropping.items() if not layer.training]:
        rank_zero_warn(
            f"{len(asleep)} of {len(dropping)} LoRA layers are in eval mode while training, first {asleep[0]}, so that "
            "lora_dropout is off: something calls eval() after the fit has begun, and has to call train() before the "
            "next training step"
        )


def _multirun() -> bool:
    """Whether this is a job of ``hydra -m``; where Hydra has not been imported, it is not."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return False
    return getattr(module.HydraConfig.get().mode, "name", None) == "MULTIRUN"
