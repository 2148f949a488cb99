"""What would fail in silence, told: refused before anything is injected, or warned of at the first step."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.state import injected_roots, record_of
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
    _check_multirun(trainer)


def check_replicated(strategy_name: str, model: nn.Module) -> None:
    """Refuse layers that share weights (``layer_replication``) where each layer's weights are split by themselves.

    Raises:
        LoraConfigError: If there are such layers.
    """
    if any(record_of(root).replicated is not None for root in injected_roots(model).values()):
        raise LoraConfigError(
            f"{strategy_name} splits the weights of each layer by itself, and layer_replication has made layers that "
            "share theirs: use strategy='ddp' or one device, or build and save a model whose layers have weights of "
            "their own"
        )


_GUARDED: weakref.WeakSet[pl.Callback] = weakref.WeakSet()


def guard_launch(callback: pl.Callback) -> None:
    """In a Hydra multirun, have a trainer with this callback checked before it starts further processes.

    No callback is asked before they have been started, when the first one waits for them and they run the sweep: so it
    is the launcher that asks. A process without a multirun is left as it is.
    """
    if _multirun() is None:
        return
    _GUARDED.add(callback)
    launch = _SubprocessScriptLauncher.launch
    if not hasattr(launch, "__wrapped__"):
        _SubprocessScriptLauncher.launch = _checking(launch)  # type: ignore[method-assign]


def _checking(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def checked(self: Any, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is not None and any(each in _GUARDED for each in trainer.callbacks):  # type: ignore[attr-defined]
            _check_multirun(trainer)
        return launch(self, function, *args, trainer=trainer, **kwargs)

    return checked


def _check_multirun(trainer: pl.Trainer) -> None:
    strategy, job = trainer.strategy, _multirun()
    if job is None or trainer.world_size == 1 or not isinstance(strategy.launcher, _SubprocessScriptLauncher):
        return
    by_slurm = strategy.launcher.cluster_environment.creates_processes_externally
    if by_slurm and "submitit" in str(job.launcher.get("_target_")):
        return  # SLURM has started all processes of this one job, each with what the job is
    raise LoraConfigError(
        f"a Hydra multirun with strategy {type(strategy).__name__} on {trainer.num_devices} devices: each further "
        "process would run the whole sweep again, and processes would train different experiments together without a "
        "word. Add hydra/launcher=lora_local to the command, which gives every job a process of its own, or start each "
        "job by itself, without -m"
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
    dropping = {name: layer for name, layer in layers.items() if layer.lora_dropout and layer.lora_drops}
    if asleep := [name for name, layer in dropping.items() if not layer.training]:
        rank_zero_warn(
            f"{len(asleep)} of {len(dropping)} LoRA layers are in eval mode while training, first {asleep[0]}, so that "
            "lora_dropout is off: something calls eval() after the fit has begun, and has to call train() before the "
            "next training step"
        )


def _multirun() -> Any:
    """Hydra's own settings if this is a job of ``hydra -m``, else None, as where Hydra has not been imported."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    settings = module.HydraConfig.get()
    return settings if getattr(settings.mode, "name", None) == "MULTIRUN" else None
