"""What a checkpoint holds under a strategy, and its way back: the part that all strategies share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.checkpoint import CHECKPOINT_KEY, FORMAT, entries_of, read_checkpoint
from lora_lightning.adapters.written import failing_together
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError
from lora_lightning.injection.state import (
    injected_roots,
    load_lora_state,
    lora_parameters,
    lora_state_dict,
    record_of,
)
from lora_lightning.injection.tensors import alone
from lora_lightning.optim import gradients
from lora_lightning.strategies import optimizer_state as by_name
from lora_lightning.strategies import rng
from lora_lightning.strategies.equal import assert_equal_across_ranks
from lora_lightning.strategies.files import use_atomic_io
from lora_lightning.strategies.gathering import whole_together
from lora_lightning.strategies.nonfinite import Watch
from lora_lightning.strategies.primitives import keep_primitives
from lora_lightning.strategies.ranks import first_with_same_rows
from lora_lightning.strategies.unfreezing import count_held, train_as_saved

K = TypeVar("K", bound=Hashable)


class AdapterState:
    """Stands between a trainer and its strategy, so that what is saved and loaded is the adapter.

    The strategy is the one place that every save passes, ``save_weights_only=True`` and asynchronous ones too, and the
    first to see a checkpoint on its way back. A checkpoint has one content whatever the strategy: the adapter's tensors
    and the optimizers' states by the parameters' canonical names, so that any strategy reads what another wrote. Here
    every process holds every parameter whole, as on one device; subclasses say what differs.

    Args:
        strategy: The trainer's strategy.

    Attributes:
        before_load: Called with what a checkpoint says of its adapters, before their values are loaded.
        rng: The random states that this process had when the loaded checkpoint was written, until they are put back.
        watch: Knows the losses of the step to come.
        held: How many parameters the optimizers had when they were looked at last; None where nobody can add any.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.entries: Callable[[], dict[str, dict[str, Any]]] = dict
        self.before_load: Callable[[Mapping[str, dict[str, Any]]], object] = dict
        self.rng: dict[str, Any] | None = None
        self.held: int | None = None
        self.watch = Watch()
        self._told: set[str] = set()
        self._save: Callable[..., None] = strategy.save_checkpoint
        self._load: Callable[..., dict[str, Any]] = strategy.load_checkpoint

    def attach(self, entries: Callable[[], dict[str, dict[str, Any]]]) -> None:
        """Let the strategy save and load through this object.

        Args:
            entries: Gives, at each save, what the checkpoint is to say of each adapter.
        """
        self.entries, self.rng, self.watch = entries, None, Watch()
        use_atomic_io(self.strategy)
        ways: dict[str, Callable[..., Any]] = {
            "lightning_module_state_dict": self.model_state,
            "optimizer_state": self.optimizer_state,
            "load_model_state_dict": self.load_model_state,
            "load_optimizer_state_dict": self.load_optimizer_states,
            "save_checkpoint": self.save,
            "load_checkpoint": self.load,
        }
        for name, way in ways.items():
            if name not in vars(self.strategy):
                vars(self.strategy)[name] = functools.partial(_choose, self, way, getattr(self.strategy, name))

    # ---- what a strategy may do otherwise

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """Called once a model, or part of one, has its adapters, before the strategy wraps it.

        Args:
            target: The LightningModule, or the part below which the adapter is.
            by_callback: Whether the callback has injected just now; else the user had done so.
        """

    def narrowed(self) -> None:
        """Called where making the optimizers has frozen part of the adapter, after the strategy has wrapped it."""

    def begin_fit(self) -> None:
        """Called before training, once the strategy has wrapped the model and made its optimizers."""
        self.held = count_held(self.strategy.optimizers)

    def synchronise(self, optimizer: Optimizer) -> None:
        """Average the gradients of an optimizer's parameters over processes where the strategy does not do so."""

    def stepped(self, optimizer: Optimizer, adapters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of the adapters' parameters that an optimizer is about to change."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in adapters.items() if id(p) in held}

    def are_finite(self, optimizer: Optimizer) -> Tensor:
        """Whether an optimizer's gradients have no NaN and no infinity: a truth value where they are."""
        return gradients.are_finite([p for group in optimizer.param_groups for p in group["params"]])

    def not_finite(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of parameters whose gradient has a NaN or an infinity; asked on every process where one has any."""
        return gradients.not_finite(parameters)

    def without_gradient(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of parameters that took no part in the loss."""
        return gradients.without_gradient(parameters)

    def skip(self, optimizer: Optimizer) -> None:
        """Make the step that is about to be taken change nothing."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """What a checkpoint gets of each tensor: itself, not a copy of its memory; None if another process gives it."""
        return [alone(tensor) for tensor in tensors]

    def write(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None) -> None:
        """Bring a finished checkpoint to disk; called on every process, and fails on all of them or on none."""
        with failing_together(path):
            self._save(checkpoint, path, storage_options=storage_options)

    # ---- what is saved

    def model_state(self) -> dict[str, Tensor]:
        """All that is not the frozen base, by canonical name."""
        return self._parts(lora_state_dict(self.module))

    def whole_state(self) -> dict[str, Tensor]:
        """The same with every tensor whole, on every process; call it on all of them."""
        state = lora_state_dict(self.module)
        return dict(zip(state, whole_together(list(state.values())), strict=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by the names of its parameters."""
        state = by_name.named_state(optimizer, self.module)
        flat = {(name, key): value for name, values in state["state"].items() for key, value in values.items()}
        parts: dict[str, dict[str, Any]] = {name: {} for name in state["state"]}
        for (name, key), value in self._parts(flat).items():
            parts[name][key] = value
        return {"state": parts, "param_groups": state["param_groups"]}

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint with what it says of its adapters, every rank's random state, and primitives only.

        Raises:
            AdapterError: If processes' adapters have drifted apart, or it cannot be written.
        """
        assert_equal_across_ranks(lora_parameters(self.module))
        if "current_model_state" in checkpoint:  # a callback has put averages, of what moves, into "state_dict"
            averages = self._parts(checkpoint["state_dict"])
            checkpoint["state_dict"] = checkpoint["current_model_state"] | averages
        awaiting = [name for name, root in injected_roots(self.module).items() if record_of(root).awaits_data]
        checkpoint[CHECKPOINT_KEY] = {
            "format": FORMAT,
            "adapters": self.entries(),
            "rng": rng.gather(),
            "awaits_data": awaiting,  # as where Lightning's tuner saves and restores around a validation
        }
        if dropped := [name for name in keep_primitives(checkpoint) if name not in self._told]:
            self._told.update(dropped)
            rank_zero_info(f"not in the checkpoint's hyper_parameters, being no plain values: {', '.join(dropped)}")
        # Processes may name it differently (a clock in its name); the first one's name counts.
        self.write(checkpoint, self.strategy.broadcast(filepath), storage_options)

    def _parts(self, values: Mapping[K, Any]) -> dict[K, Any]:
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        parts = dict(zip(tensors, self.parts(list(tensors.values())), strict=True))
        found = {key: parts.get(key, value) for key, value in values.items()}
        return {key: value for key, value in found.items() if value is not None}

    # ---- what is loaded

    def load(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint in any form, without running code from it unless ``weights_only=False`` is asked for."""
        path = self.strategy.broadcast(checkpoint_path)
        if weights_only is not False and Path(path).exists():
            return read_checkpoint(path)
        return self._load(path, **({} if weights_only is None else {"weights_only": weights_only}))

    def load_model_state(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a checkpoint's adapter into the module, whatever ``strict`` says: each name must fit.

        Raises:
            AdapterError: If the checkpoint has no adapter, or another one.
        """
        entries = entries_of(checkpoint, "the checkpoint")
        self.before_load(entries)
        self._compare(entries)
        load_lora_state(self.module, checkpoint["state_dict"], "the checkpoint")
        for name, root in injected_roots(self.module).items():
            record_of(root).awaits_data = name in checkpoint[CHECKPOINT_KEY].get("awaits_data", ())
        self.rng = rng.of_rank(checkpoint[CHECKPOINT_KEY].get("rng"), first_with_same_rows(self.strategy))
        if self.module.trainer.state.fn == TrainerFn.FITTING and not self.strategy.lightning_restore_optimizer:
            self.load_optimizer_states(checkpoint)  # Lightning leaves it to such a strategy to ask for them

    def load_optimizer_states(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the optimizers' states back.

        Raises:
            AdapterError: If the optimizers or their groups are others than those of the checkpoint.
        """
        saved = checkpoint.get("optimizer_states")
        if saved is None:
            raise AdapterError("the checkpoint has no optimizer state (save_weights_only=True): it cannot be resumed")
        train_as_saved(self.strategy.optimizers, saved, self.module)
        orders = by_name.load_named_states(self.strategy.optimizers, saved, self.module)
        # Lightning loads the schedulers next, which count their optimizer's groups.
        of_optimizer = {id(o): order for o, order in zip(self.strategy.optimizers, orders, strict=True)}
        schedulers = checkpoint.get("lr_schedulers", [])
        for number, config in enumerate(self.strategy.lr_scheduler_configs[: len(schedulers)]):
            if (order := of_optimizer.get(id(getattr(config.scheduler, "optimizer", None)))) is not None:
                schedulers[number] = by_name.in_order(schedulers[number], order)

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule."""
        module = self.strategy.lightning_module
        if module is None:
            raise AdapterError("no LightningModule is connected to the trainer's strategy")
        return module

    def _compare(self, entries: Mapping[str, dict[str, Any]]) -> None:
        problems = []
        for name, mine in self.entries().items():
            if name not in entries:
                problems.append(f"it holds no adapter {name!r}, only {', '.join(entries)}")
                continue
            there = entries[name]
            problems += LoraConfig.from_dict(mine["lora_config"]).difference(LoraConfig.from_dict(there["lora_config"]))
            folded, wanted = mine["record"].get("bases", []), there["record"].get("bases", [])
            if folded != wanted:
                problems.append(f"adapters folded into the base: {folded or 'none'} here, {wanted or 'none'} there")
            here, told = mine["record"].get("base_fingerprint"), there["record"].get("base_fingerprint")
            if here and told and here != told:
                warnings.warn("the checkpoint's adapter was trained on another base model than this", stacklevel=2)
        if problems:
            raise AdapterError(
                "the checkpoint was made with another LoRA config (here: this run's, there: the checkpoint's):"
                + "".join(f"\n  - {line}" for line in problems)
            )


def _choose(state: AdapterState, ours: Callable[..., Any], own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Our way where the module has an adapter; the strategy's own where another trainer has taken it for another."""
    module = state.strategy.lightning_module
    return (ours if module is not None and injected_roots(module) else own)(*args, **kwargs)
