"""Lightning's callbacks that average weights, made to average what trains and nothing of the base.

They copy the LightningModule and pair its parameters with the copy's. Here they are given a small module that holds
the adapter's own tensors instead, so that their copy, their steps and what they save are of the adapter's size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.state import lora_parameters, lora_state_dict
from lora_lightning.injection.tensors import spread_like

_MARK = "_lora_average"
# Lightning 2.5 has none.
_WEIGHT_AVERAGING: type | None = getattr(lightning_callbacks, "WeightAveraging", None)


class Moving(nn.Module):
    """What moves in a module while it trains, by canonical name: the tensors themselves, not copies.

    Args:
        named: Tensors; parameters stay parameters, others count as buffers.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in named.items():  # by their whole names, dots and all, which register_parameter refuses
            (self._parameters if isinstance(tensor, nn.Parameter) else self._buffers)[name] = tensor  # type: ignore[assignment]

    @classmethod
    def of(cls, module: nn.Module) -> Moving:
        """That of an injected module."""
        if isinstance(module, cls):
            return module
        everything = {name: t for name, t in lora_state_dict(module).items() if isinstance(t, Tensor)}
        return cls(everything | lora_parameters(module))

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, _1: Any, _2: Any, missing_keys: list[str], *_: Any
    ) -> None:
        for name, tensor in chain(self._parameters.items(), self._buffers.items()):
            if tensor is not None and prefix + name in state_dict:
                tensor.copy_(spread_like(state_dict[prefix + name], tensor))
            else:
                missing_keys.append(prefix + name)


class AveragedAdapter(AveragedModel):
    """torch's running average, of what moves."""

    def update_parameters(self, model: nn.Module) -> None:
        """Take the present values into the average."""
        super().update_parameters(Moving.of(model))


def attach_averaging(trainer: pl.Trainer) -> None:
    """Let a trainer's averaging callbacks average adapters, those before ours in the list and those behind it.

    Raises:
        LoraConfigError: If the strategy does not let an average be taken.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not _averages(callback):
            continue
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise LoraConfigError(
                f"{type(callback).__name__} reads parameters that DeepSpeed keeps in its engine: take it out, or use "
                "strategy='fsdp' or 'ddp'"
            )
        if _MARK in vars(callback):
            continue
        _replace(callback, "setup", _nothing)  # copies the module; begin_averaging does it instead
        if isinstance(callback, StochasticWeightAveraging):
            _attach_swa(callback)
        else:
            _on_moving(callback, "_swap_models", 0)
            _on_moving(callback, "_copy_average_to_current", 0)
            _on_moving(callback, "on_load_checkpoint", 1)


def detach_averaging(trainer: pl.Trainer) -> None:
    """Give the averaging callbacks their own ways back, for another trainer's run."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in vars(callback).pop(_MARK, ()):
            vars(callback).pop(name, None)


def begin_averaging(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give the averaging callbacks the adapter as it begins; called once it is there."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            callback._average_model = deepcopy(Moving.of(pl_module))  # type: ignore[assignment]
        elif _averages(callback):
            device = callback._device or pl_module.device
            callback._average_model = AveragedAdapter(
                Moving.of(pl_module), device=device, use_buffers=callback._use_buffers, **callback._kwargs
            )


def _averages(callback: pl.Callback) -> bool:
    kinds = (StochasticWeightAveraging,) + ((_WEIGHT_AVERAGING,) if _WEIGHT_AVERAGING else ())
    return isinstance(callback, kinds)


def _attach_swa(callback: StochasticWeightAveraging) -> None:
    _on_moving(callback, "transfer_weights", 1)
    _on_moving(callback, "update_parameters", 1)
    # Statistics that stay frozen are not to be made anew in a pass over the data, of which they would see nothing.
    _replace(callback, "pl_module_contains_batch_norm", _has_moving_norms)
    _replace(callback, "reset_batch_norm_and_save_state", functools.partial(_reset, callback))


def _reset(callback: StochasticWeightAveraging, pl_module: pl.LightningModule) -> None:
    kept = [(norm, deepcopy(norm.state_dict()), norm.momentum) for norm in _norms(pl_module, moving=False)]
    type(callback).reset_batch_norm_and_save_state(callback, pl_module)
    for norm, state, momentum in kept:
        norm.load_state_dict(state)
        norm.momentum = momentum
        callback.momenta.pop(norm, None)


def _has_moving_norms(pl_module: pl.LightningModule) -> bool:
    return bool(_norms(pl_module, moving=True))


def _norms(module: nn.Module, *, moving: bool) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training is moving]


def _on_moving(callback: pl.Callback, method: str, position: int) -> None:
    """Have a method of a callback see what moves in place of the LightningModule, its argument at ``position``."""
    _replace(callback, method, functools.partial(_call_on_moving, getattr(callback, method), position))


def _call_on_moving(method: Any, position: int, *args: Any) -> Any:
    return method(*args[:position], Moving.of(args[position]), *args[position + 1 :])


def _replace(callback: pl.Callback, method: str, by: Any) -> None:
    vars(callback).setdefault(_MARK, []).append(method)
    vars(callback)[method] = by


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for a hook whose work is done elsewhere."""
