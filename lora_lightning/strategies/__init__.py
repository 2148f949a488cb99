"""How each Lightning strategy saves and loads what trains; the callback picks one by the trainer's strategy."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lora_lightning.strategies.ddp import DdpState
from lora_lightning.strategies.deepspeed import DeepSpeedState
from lora_lightning.strategies.forked import ForkedState
from lora_lightning.strategies.fsdp import FsdpState
from lora_lightning.strategies.model_parallel import ModelParallelState
from lora_lightning.strategies.state import AdapterState

__all__ = ["AdapterState", "state_for", "state_of"]

_STATE = "_lora_state"

_STATES: dict[type[Strategy], type[AdapterState]] = {
    DeepSpeedStrategy: DeepSpeedState,  # before DDP, of which it is a subclass
    FSDPStrategy: FsdpState,
    ModelParallelStrategy: ModelParallelState,
    DDPStrategy: DdpState,
    SingleDeviceStrategy: AdapterState,
}


def state_of(trainer: pl.Trainer) -> AdapterState:
    """The one object that saves and loads for a trainer, made when it is first asked for."""
    known = vars(trainer.strategy)
    if _STATE not in known:
        known[_STATE] = state_for(trainer.strategy)
    return known[_STATE]


def state_for(strategy: Strategy) -> AdapterState:
    """The way to save and load adapters under a strategy; a warning where the strategy is not known."""
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        return ForkedState(strategy)
    for kind, state in _STATES.items():
        if isinstance(strategy, kind):
            return state(strategy)
    warnings.warn(
        f"{type(strategy).__name__} is not a strategy known here: adapters are saved as if every process held the "
        "whole model",
        stacklevel=2,
    )
    return AdapterState(strategy)
