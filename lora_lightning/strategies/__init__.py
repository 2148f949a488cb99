"""How each Lightning strategy saves and loads what trains; the callback picks one by the trainer's strategy."""

from __future__ import annotations

import warnings

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lora_lightning.errors import LoraConfigError
from lora_lightning.strategies.plain import PlainState

__all__ = ["PlainState", "state_for"]

_WHOLE = (SingleDeviceStrategy, DDPStrategy)  # every rank holds every parameter whole
_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def state_for(strategy: Strategy) -> PlainState:
    """The way to save and load adapters under a strategy.

    Raises:
        LoraConfigError: For a strategy under which adapters would be lost.
    """
    name = type(strategy).__name__
    if isinstance(strategy, _SHARDED):
        raise LoraConfigError(
            f"{name} shards parameters, and adapters cannot be saved under it yet: use strategy='ddp' or one device"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise LoraConfigError(
            f"{name} trains in forked or spawned processes, whose adapters do not come back to this one: "
            "use strategy='ddp'"
        )
    if not isinstance(strategy, _WHOLE):
        warnings.warn(
            f"{name} is not a strategy known here: adapters are saved as if every process held the whole model",
            stacklevel=2,
        )
    return PlainState(strategy)
