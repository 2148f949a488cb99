"""LoRA for a Lightning Trainer: one callback that injects, freezes, filters, and saves adapters only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.checkpoint import checkpoint_entry
from lora_lightning.adapters.files import check_writable
from lora_lightning.adapters.folder import check_finite
from lora_lightning.adapters.written import first_process_writes
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import LoraReport, lora_parameters, report_of
from lora_lightning.injection.starts.residual import settle_again
from lora_lightning.injection.state import (
    Injected,
    adapter_tensors,
    freeze_statistics,
    injected_roots,
    lora_layers,
    record_of,
    the_root,
)
from lora_lightning.optim.by_kind import join_groups
from lora_lightning.optim.fused import lay_alike
from lora_lightning.optim.modes import leave_modes
from lora_lightning.strategies import AdapterState, hooks, state_of, undrawn
from lora_lightning.strategies.allocator import keep_freed_memory
from lora_lightning.strategies.averaging import attach_averaging, begin_averaging, detach_averaging
from lora_lightning.strategies.broadcast import include_frozen
from lora_lightning.strategies.checks import check_first_step, check_trainer, guard_launch
from lora_lightning.strategies.chosen import target_of
from lora_lightning.strategies.configured import configure
from lora_lightning.strategies.ending import leave_group_at_exit
from lora_lightning.strategies.first_data import await_data, take_ranks
from lora_lightning.strategies.injecting import log_facts, put_in, tell_injected, tell_still
from lora_lightning.strategies.nonfinite import NonFiniteError
from lora_lightning.strategies.position import attach_position
from lora_lightning.strategies.products import local_folder, write_adapter, write_best
from lora_lightning.strategies.unfreezing import freeze_again, keep_base
from lora_lightning.strategies.waking import wake
from lora_lightning.strategies.window import is_full


class LoraCallback(pl.Callback):
    """Trains a LightningModule's network with LoRA.

    At ``setup`` (for a network built in ``LightningModule.setup`` or ``configure_model``: right after it) the layers
    that the config names get an adapter and everything else is frozen. Optimizers see what trains, checkpoints hold
    it and nothing of the base, and at the end of ``fit`` an adapter folder that PEFT reads lies in
    ``<trainer.log_dir>/adapter``, with another beside the best checkpoint. Where ``init_lora_weights`` asks for data
    (``"eva"``, ``"corda"``, ``"lora_ga"``), batches of the training data begin the adapter before the first step.

    Args:
        config: A :class:`LoraConfig` or a mapping of its fields. None is the balanced pattern (r=16, alpha 32, all
            linear layers, dropout 0.05), or what ``adapter`` or an injected model has already.
        adapter: Folder of a saved adapter to go on training (PEFT's too), or ``owner/name[@revision]`` on the Hub.
        base_adapter: Folder of a saved adapter, or one on the Hub, to fold into the base before a new one is trained;
            those that it was trained over itself go first.
        module: Attribute of the LightningModule to inject below; nothing outside it is touched.
        name: The adapter's name; two callbacks of one trainer need two.
        on_nonfinite: What to do when a loss or gradients are not finite: ``"stop"`` with an error, or ``"skip"`` the
            step, which then changes nothing. Of several callbacks one that says stop counts.
        freeze_norm_stats: Keep the running statistics of normalisation layers (BatchNorm) in the frozen base as they
            are, so that the adapter over the untouched base is all that training has made. False lets them move;
            checkpoints and adapter folders then hold them, and PEFT does not read them.

    Attributes:
        report: What was injected, a :class:`LoraReport`, once ``setup`` has run.
        adapter_path: Where the adapter folder was written, after ``fit``.
        best_adapter_path: Where that of the best checkpoint was written, after ``fit``, or None.

    Raises:
        LoraConfigError: If an argument is wrong.
    """

    def __init__(
        self,
        config: LoraConfig | dict[str, Any] | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        base_adapter: str | os.PathLike[str] | None = None,
        module: str | None = None,
        name: str = "default",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        freeze_norm_stats: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(config, Mapping):
            config = LoraConfig.from_dict(config)
        if config is not None and not isinstance(config, LoraConfig):
            raise LoraConfigError(f"config must be a LoraConfig or a mapping of its fields, got {config!r}")
        if on_nonfinite not in ("stop", "skip"):
            raise LoraConfigError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
        if not name or name != Path(name).name:
            raise LoraConfigError(f"name must be usable as a folder's name, got {name!r}")
        self.config = config
        self.adapter = None if adapter is None else os.fspath(adapter)
        self.base_adapter = None if base_adapter is None else os.fspath(base_adapter)
        self.module = module
        self.name = name
        self.on_nonfinite = on_nonfinite
        self.freeze_norm_stats = freeze_norm_stats
        self.report: LoraReport | None = None
        self.adapter_path: Path | None = None
        self.best_adapter_path: Path | None = None
        self._entry: dict[str, Any] | None = None
        self._entry_of: Injected | None = None
        self._logged: set[int] = set()
        self._first_step = True
        self._validation = undrawn.Validation()
        self._still: dict[str, nn.Module] = {}
        self._tensors: tuple[str, ...] = ()
        guard_launch(self)

    @property
    def state_key(self) -> str:
        """Tells adapters of one trainer apart."""
        return f"LoraCallback[{self.name}]"

    # ---- injection

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Inject where the layers are there already, and take the places that later steps pass."""
        check_trainer(trainer)
        _check_callbacks(trainer)
        # Gradients are averaged and averages copied after us, wherever in the list the user has put us.
        trainer.callbacks.remove(self)  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        state_of(trainer).attach(functools.partial(_entries, trainer, pl_module))
        state_of(trainer).before_load = functools.partial(_take_ranks, trainer, pl_module)
        attach_position(trainer)
        attach_averaging(trainer)
        leave_group_at_exit()
        self._first_step = True
        hooks.inject_when_built(trainer, pl_module, self._inject)
        if stage == "fit":
            hooks.wrap(pl_module, "configure_optimizers", self._configure_optimizers)

    def _inject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        target = self._target(pl_module)
        fresh = not injected_roots(target)
        report = put_in(trainer, pl_module, target, self.config, adapter=self.adapter, base_adapter=self.base_adapter)
        self._tensors = tuple(adapter_tensors(target))
        self._still = freeze_statistics(target) if self.freeze_norm_stats else {}
        if fresh:
            tell_still(self._still)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            begin_averaging(trainer, pl_module)
        record = record_of(the_root(target)[1])
        if self._entry_of is not record:
            # Made now, while the base is whole; nothing in it moves while training.
            self._entry, self._entry_of = checkpoint_entry(pl_module, self.module), record
            tell_injected(report)
        heads = report.frozen_heads or (self.report.frozen_heads if self.report else ())
        self.report = report_of(target, heads, whole=pl_module)
        log_facts(self.report.facts("" if self.name == "default" else f"{self.name}/"), trainer.loggers, self._logged)
        freeze_again(trainer, pl_module)
        if fitting:
            await_data(trainer, pl_module, self.module, self._inject_anew)

    def _inject_anew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the adapter as it is now, where its layers have got other ranks."""
        self._entry_of, self._logged = None, set()
        self._inject(trainer, pl_module)

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        return target_of(pl_module, self.module)

    def _configure_optimizers(self, pl_module: pl.LightningModule, call: Callable[[], Any]) -> Any:
        return configure(pl_module, self._target(pl_module), self._tensors, call)

    # ---- training

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put adapted layers into train mode (a pretrained model comes in eval mode), and random states back."""
        if not getattr(trainer, "fast_dev_run", False):
            # Refused now, not when training is over.
            check_writable(local_folder(trainer.log_dir or trainer.default_root_dir))
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        state, target = state_of(trainer), self._target(pl_module)
        state.begin_fit()
        settle_again(layer for _, layer in lora_layers(target))
        if self._still:
            self._still = freeze_statistics(target)  # a strategy may have put others in their place
        wake(target)
        undrawn.before_first_iterator(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within an epoch, an uninterrupted run would not have made an iterator here: undo what that has drawn."""
        undrawn.at_train_start(trainer, state_of(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the base frozen where another callback has just let layers train, or ``self.train()`` was called."""
        for norm in self._still.values():
            norm.training = False
        self._keep_base(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the random states where a validation follows, which a run resumed at this batch would not make."""
        self._validation.note(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let training go on as if nothing had been drawn by the validation."""
        self._validation.undo(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss, which may be infinite with gradients that are not."""
        if self is _callbacks(trainer)[0]:
            state_of(trainer).watch.note(loss, trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Average gradients where the strategy does not; stop at, or skip, a step that is not finite."""
        state, callbacks = state_of(trainer), _callbacks(trainer)
        self._keep_base(trainer, pl_module)
        if self is not callbacks[0] or not is_full(trainer.strategy):
            return
        state.synchronise(optimizer)
        lay_alike(optimizer)
        for callback in callbacks:
            callback._look_at_first_step(state, optimizer, pl_module)
        skip = all(callback.on_nonfinite == "skip" for callback in callbacks)
        state.watch.stop_or_skip(state, optimizer, trainer, skip=skip)

    def _keep_base(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        keep_base(state_of(trainer), (callback._target(pl_module) for callback in _callbacks(trainer)))

    def _look_at_first_step(self, state: AdapterState, optimizer: Optimizer, pl_module: pl.LightningModule) -> None:
        named = state.stepped(optimizer, lora_parameters(self._target(pl_module))) if self._first_step else {}
        if named:
            self._first_step = False
            check_first_step(dict(lora_layers(self._target(pl_module))), named, state.without_gradient(named))

    # ---- what stays

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapter folders."""
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir talks to all ranks: ask before they part
        state = state_of(trainer).whole_state()
        check_finite(state)  # on all ranks: none is to wait for one that has failed
        if not getattr(trainer, "fast_dev_run", False):
            first_process_writes(folder, functools.partial(self._write_adapters, trainer, pl_module, folder, state))

    def _write_adapters(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: str, state: dict[str, Tensor]
    ) -> None:
        place = self._write_adapter(trainer, pl_module, folder, state)
        self.best_adapter_path = write_best(trainer, pl_module, self.name)
        rank_zero_info(f"LoRA adapter saved to {place}")

    def _write_adapter(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: str, state: dict[str, Tensor]
    ) -> Path:
        entry = self.checkpoint_entry(pl_module)
        self.adapter_path = write_adapter(trainer, pl_module, folder, self.name, entry, state)
        return self.adapter_path

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give hooks and callbacks back what is theirs."""
        _give_back(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give back as at the end; where gradients were not finite, write the last good adapter."""
        _give_back(trainer, pl_module)
        for optimizer in trainer.optimizers:
            join_groups(optimizer)
        if isinstance(exception, NonFiniteError):
            folder = trainer.log_dir or trainer.default_root_dir
            state = state_of(trainer).whole_state()  # all processes have met the same gradients, and are here
            if trainer.is_global_zero:
                rank_zero_info(f"The last good adapter: {self._write_adapter(trainer, pl_module, folder, state)}")

    def checkpoint_entry(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What a checkpoint says of this adapter.

        Args:
            pl_module: The module that is trained.
        """
        if self._entry is None:
            self._entry = checkpoint_entry(pl_module, self.module)
        return self._entry


def _give_back(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    hooks.unwrap(pl_module)
    detach_averaging(trainer)
    leave_modes(trainer)
    include_frozen(pl_module)


def _check_callbacks(trainer: pl.Trainer) -> None:
    names = [callback.name for callback in _callbacks(trainer)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LoraConfigError(
            f"two LoraCallbacks have the name {twice[0]!r}: give each a name= and a module= of its own"
        )


def _callbacks(trainer: pl.Trainer) -> list[LoraCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LoraCallback)]  # type: ignore[attr-defined]


def _entries(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    return {callback.name: callback.checkpoint_entry(pl_module) for callback in _callbacks(trainer)}


def _take_ranks(trainer: pl.Trainer, pl_module: pl.LightningModule, entries: Mapping[str, Any]) -> None:
    for callback in _callbacks(trainer):
        if callback.name in entries and take_ranks(callback._target(pl_module), entries[callback.name]):
            callback._inject_anew(trainer, pl_module)
