"""DeepSpeed's ZeRO: gradients, optimizer states and (stage 3) parameters are spread over processes by its engine."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.checkpoint import entries_of
from lora_lightning.adapters.files import atomic_folder
from lora_lightning.adapters.zero import TAG, write_whole
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection.names import canonical
from lora_lightning.injection.state import copy_originals, lora_state_dict, trained_in_full
from lora_lightning.strategies import zero_optimizer
from lora_lightning.strategies.state import AdapterState

_TENSORS = ("state_dict", "optimizer_states")


class DeepSpeedState(AdapterState):
    """Adapters among DeepSpeed's parameters, read and set through its own functions; the base is never gathered.

    A checkpoint is DeepSpeed's folder, without frozen parameters. Beside what its engine writes, which fits this stage
    and this number of processes only, the first process writes the whole adapter and its optimizer states by name:
    that is what is read again, here and under every other strategy.

    DeepSpeed steps, clips (``gradient_clip_val`` goes into its config) and averages by itself.
    """

    def attach(self, *args: Any) -> None:  # noqa: D102  # as the base class's
        super().attach(*args)
        cast("DeepSpeedStrategy", self.strategy).exclude_frozen_parameters = True
        # Lightning has divided a loss by the batches that are accumulated; DeepSpeed would once more.
        plugin = self.strategy.precision_plugin
        vars(plugin)["backward"] = functools.partial(type(plugin).backward, plugin, scale_wrt_gas=False)

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """See that DeepSpeed is set up in a way that is supported, and what the base's own values were.

        Raises:
            LoraConfigError: If ZeRO is off, or the config has an optimizer of its own.
        """
        config = cast("DeepSpeedStrategy", self.strategy).config or {}
        if config.get("zero_optimization", {}).get("stage", 0) not in (1, 2, 3):
            raise LoraConfigError(
                "DeepSpeed without ZeRO does what DDP does: use strategy='ddp', or one of deepspeed_stage_1, "
                "deepspeed_stage_2, deepspeed_stage_3"
            )
        if "optimizer" in config:
            raise LoraConfigError(
                "the DeepSpeed config has an 'optimizer', which would be made outside configure_optimizers: take it "
                "out and return the optimizer from configure_optimizers"
            )

        self._copy_originals(target)

    def begin_fit(self) -> None:
        """Its engine's optimizer holds buffers in place of parameters, and ``BaseFinetuning`` refuses DeepSpeed."""

    # ---- gradients

    def stepped(self, optimizer: Optimizer, adapters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """All that trains, at the last batch of those that are accumulated; nothing before it.

        Lightning calls the step for every batch, since DeepSpeed accumulates by itself.
        """
        return dict(adapters) if self.engine.is_gradient_accumulation_boundary() else {}

    def are_finite(self, optimizer: Optimizer) -> Tensor:
        """The same, of what its engine has averaged: one exchange of a flag.

        Under fp16, where overflows are a matter of the loss scale, DeepSpeed deals with them alone.
        """
        engine = self.engine
        sound = engine.fp16_enabled() or not engine.optimizer.has_overflow(partition_gradients=True)
        return torch.tensor(bool(sound))

    def not_finite(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of parameters whose gradient has a NaN or an infinity; gathered one at a time."""
        from deepspeed.utils import safe_get_full_grad

        if bool(self.are_finite(self.engine.optimizer)):
            return []
        gradients = {name: safe_get_full_grad(p) for name, p in parameters.items()}
        bad = [name for name, grad in gradients.items() if grad is not None and not bool(grad.isfinite().all())]
        return bad or list(parameters)

    def without_gradient(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Not known: a parameter that took no part in the loss has a gradient of zeros in DeepSpeed's buffers."""
        return []

    def skip(self, optimizer: Optimizer) -> None:
        """DeepSpeed passes over a step whose gradients are not finite; where the loss alone is not, they become so."""
        zero_optimizer.scale_gradients(self.engine.optimizer, float("nan"))

    # ---- what is saved

    def model_state(self) -> dict[str, Tensor]:
        """All that is not the frozen base, by canonical name: whole, in the precision in which it is trained."""
        state = self.whole_state()
        return {name: value.cpu() for name, value in state.items()} if self.strategy.is_global_zero else {}

    def whole_state(self) -> dict[str, Tensor]:
        """The same on every process; call it on all of them."""
        named = self._parameters()
        with self._gathered(named):
            state = {name: value.detach().clone() for name, value in lora_state_dict(self.module).items()}
        for name, parameter in named.items():
            if name in state and (master := zero_optimizer.master(parameter)) is not None:
                state[name] = master
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state by the names of its parameters; its tensors on the first process only."""
        state = zero_optimizer.named_state(self.engine.optimizer, self._parameters())
        return state if self.strategy.is_global_zero else {"state": {}, "param_groups": state["param_groups"]}

    def write(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None) -> None:
        """A folder: the engine's own files from every process, and ours from the first.

        Raises:
            TypeError: If ``storage_options`` are given, which DeepSpeed cannot use.
        """
        if storage_options is not None:
            raise TypeError("storage_options are not supported with DeepSpeed, which writes checkpoints by itself")
        steps = self.engine.gradient_accumulation_steps()
        if left := self.engine.micro_steps % steps:
            warnings.warn(
                f"the checkpoint {path} is without the gradients of {left} accumulated batches: DeepSpeed carries them "
                f"over the end of an epoch whose batches are no multiple of accumulate_grad_batches={steps}, and a "
                "resumed run begins to accumulate anew",
                stacklevel=2,
            )
        client_state = {key: value for key, value in checkpoint.items() if key not in _TENSORS}
        with atomic_folder(path) as folder:
            self.engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state, exclude_frozen_parameters=True)
            if self.strategy.is_global_zero:
                write_whole(checkpoint, folder)

    # ---- what is loaded

    def load_model_state(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a checkpoint's adapter into the parameters, and into the optimizer's copies of them.

        Raises:
            AdapterError: If the checkpoint has no adapter, or another one.
        """
        entries_of(checkpoint, "the checkpoint")
        named = self._parameters()
        with self._gathered(named, modifier_rank=0):
            super().load_model_state(checkpoint, strict)
        for name, parameter in named.items():
            if name in checkpoint["state_dict"]:
                zero_optimizer.set_master(parameter, checkpoint["state_dict"][name])

    def load_optimizer_states(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the optimizer's state back.

        Raises:
            AdapterError: If the optimizer or its groups are others than those of the checkpoint.
        """
        saved = checkpoint.get("optimizer_states")
        if saved is None:
            raise AdapterError("the checkpoint has no optimizer state (save_weights_only=True): it cannot be resumed")
        if len(saved) != 1:
            raise AdapterError(f"the checkpoint has the states of {len(saved)} optimizers, DeepSpeed takes one")
        zero_optimizer.load_named_state(self.engine.optimizer, saved[0], self._parameters())

    # ---- DeepSpeed

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return cast("DeepSpeedStrategy", self.strategy).deepspeed_engine

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by canonical name."""
        return {canonical(name): p for name, p in self.module.named_parameters() if p.requires_grad}

    def _copy_originals(self, target: nn.Module) -> None:
        """Copy what trains in full once more where a model was built partitioned: injection has found it empty."""
        empty = [
            (module, list(originals))
            for _, module, originals in trained_in_full(target)
            if any(not v.numel() and hasattr(getattr(module, local), "ds_id") for local, v in originals.items())
        ]
        parameters = {f"{i}.{n}": p for i, (m, _) in enumerate(empty) for n, p in m.named_parameters(recurse=False)}
        with self._gathered(parameters):
            for module, names in empty:
                copy_originals(module, names)

    @contextlib.contextmanager
    def _gathered(self, named: Mapping[str, nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
        """Stage 3: these parameters whole while the block runs; what ``modifier_rank`` writes into them stays."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=modifier_rank):
            yield
