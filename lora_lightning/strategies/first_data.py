"""Adapters that begin as data show, shown the trainer's own batches before the strategy takes the model."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import settings_of
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.starts.data import begin_as_shown, look_at_data
from lora_lightning.injection.starts.ranks import with_ranks
from lora_lightning.injection.state import record_of, the_root
from lora_lightning.strategies import rng
from lora_lightning.strategies.chosen import target_of
from lora_lightning.strategies.generators import generators_of, restore_generators

_DEALT = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
}
"""What of a config data may change."""
_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)
"""Iterators that hold no data, or never run out of them."""
Then = Callable[[pl.Trainer, pl.LightningModule], None]
_SPREADING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def take_ranks(target: nn.Module, entry: Mapping[str, Any]) -> bool:
    """Give an adapter that awaits data the ranks that data had given the one of a checkpoint.

    Args:
        target: The module below which the adapter is.
        entry: What the checkpoint says of it.

    Returns:
        Whether ranks have changed; not where the configs differ in anything else, which is told later.
    """
    root = the_root(target)[1]
    record, saved = record_of(root), LoraConfig.from_dict(entry["lora_config"])
    mine, theirs = record.config.to_dict(), saved.to_dict()
    differing = {key for key in mine if mine[key] != theirs[key]}
    if not record.awaits_data or not differing or not differing <= _DEALT:
        return False
    with_ranks(root, saved)
    return True


def await_data(trainer: pl.Trainer, pl_module: pl.LightningModule, attribute: str | None, then: Then) -> None:
    """Have an adapter that awaits data begin with them, after injection and before the strategy takes the model.

    Args:
        trainer: Of a fit that begins.
        pl_module: The module that is trained.
        attribute: Of it, below which the adapter is; None is all of it.
        then: Called with trainer and module once the adapter has begun, whose layers may have other ranks by then.
    """
    if _awaits_data(target_of(pl_module, attribute)):
        _before_setup(trainer.strategy, functools.partial(_begin, trainer, pl_module, attribute, then))


def _begin(trainer: pl.Trainer, pl_module: pl.LightningModule, attribute: str | None, then: Then) -> None:
    target = target_of(pl_module, attribute)
    if trainer.lightning_module is pl_module and _awaits_data(target):  # no checkpoint has been loaded meanwhile
        _begin_with_data(trainer, pl_module, target)
        then(trainer, pl_module)


def _before_setup(strategy: Strategy, act: Callable[[], None]) -> None:
    vars(strategy)["setup"] = functools.partial(_first, strategy, act, vars(strategy).get("setup"))


def _first(strategy: Strategy, act: Callable[[], None], earlier: Callable[..., None] | None, trainer: Any) -> None:
    vars(strategy).pop("setup", None)
    act()
    (earlier or strategy.setup)(trainer)


def _begin_with_data(trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module) -> None:
    """Begin the adapter below ``target`` as batches of the trainer's data show: on every process as on the first.

    Raises:
        LoraConfigError: If the strategy spreads the model, the module or its data cannot be asked for losses, or the
            data can be read only once.
    """
    config = record_of(the_root(target)[1]).config
    how = config.init_lora_weights
    if isinstance(trainer.strategy, _SPREADING):
        raise LoraConfigError(
            f"init_lora_weights={how!r} runs batches through the whole model before training, and "
            f"{type(trainer.strategy).__name__} spreads it over processes: inject_lora and initialise_from_data the "
            "network yourself before trainer.fit, or use strategy='ddp'"
        )
    if not pl_module.automatic_optimization:
        raise LoraConfigError(
            f"init_lora_weights={how!r}: {type(pl_module).__name__} steps its optimizers by itself, so that no loss "
            "can be had from it beforehand: inject_lora and initialise_from_data the network before trainer.fit"
        )
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise LoraConfigError(f"init_lora_weights={how!r} looks at training data, and the trainer has none")
    drawn = rng.capture()
    device = trainer.strategy.root_device
    pl_module.to(device)
    try:
        with _unlogged(pl_module), torch.inference_mode(False):
            loader = source.dataloader()
            combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
            with _undrawn([part for part in combined.flattened if isinstance(part, DataLoader)]):
                _check_read_again(combined, how)
                batches = _batches(trainer, combined, device, settings_of(config)["batches"], again=how == "eva")
                shown = look_at_data(target, batches, loss=_loss_of(trainer, pl_module))
    finally:
        rng.restore(drawn)
    begin_as_shown(target, trainer.strategy.broadcast(shown))
    rank_zero_info(f"LoRA began as the training data show (init_lora_weights={how!r})")


def _awaits_data(target: nn.Module) -> bool:
    """Whether an adapter is to be shown data: not one whose values have been loaded."""
    return record_of(the_root(target)[1]).awaits_data


def _check_read_again(loaders: CombinedLoader, how: Any) -> None:
    """Refuse data that can be read only once: what is looked at would be missing from training."""
    for loader in loaders.flattened:
        read = loader
        if isinstance(loader, DataLoader):
            if loader.num_workers and not loader.persistent_workers:
                continue  # workers read a copy of the data set, and the next ones another
            read = loader.dataset
            if not isinstance(read, IterableDataset):
                continue
        why = next(_read_once(read), None)
        if why is not None:
            raise LoraConfigError(
                f"init_lora_weights={how!r} looks at training data before the first step, and {type(read).__name__} "
                f"can be read only once ({why}): training would miss what was looked at. Give it a __iter__ that "
                "begins anew (one that yields rows), or inject_lora and initialise_from_data the network with batches "
                "of your own before trainer.fit"
            )


def _read_once(read: Any) -> Iterator[str]:
    """Why data end once they have been read."""
    for name, value in getattr(read, "__dict__", {}).items():
        if isinstance(value, Iterator) and not isinstance(value, _ENDLESS) and not hasattr(value, "seek"):
            yield f"its {name} is a {type(value).__name__}, which does not begin again"
        for part in value if isinstance(value, (list, tuple)) else [value]:  # of a chain of data sets
            if isinstance(part, IterableDataset):
                yield from _read_once(part)
    first = iter(read)
    if first is read or first is iter(read):
        yield "its iter() gives the same iterator again"


@contextmanager
def _undrawn(loaders: list[DataLoader[Any]]) -> Iterator[None]:
    """Generators of the loaders' own are afterwards where they were before the ``with`` block."""
    states = [generators_of(loader) for loader in loaders]
    try:
        yield
    finally:
        for loader, drawn in zip(loaders, states, strict=True):
            restore_generators(loader, drawn)


def _batches(
    trainer: pl.Trainer, combined: CombinedLoader, device: torch.device, most: int, *, again: bool
) -> Iterator[Any]:
    """At most so many batches of loaders, on the device, from the start again where they end and ``again`` says so."""
    left = most
    while left:
        before = left
        for batch, _, _ in itertools.islice(iter(combined), left):
            yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), device)
            left -= 1
        if not again or left == before:
            return


def _loss_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[Any], Tensor]:
    """The mean loss of a batch as the LightningModule says it."""

    def loss(batch: Any) -> Tensor:
        with trainer.precision_plugin.forward_context():
            if hasattr(pl_module, "lora_task_type"):  # a task of ours, whose training_step scales its loss
                total, count = cast("Any", pl_module).loss_sum(batch)[:2]
                return total / count.clamp(min=1)
            given = len(inspect.signature(pl_module.training_step).parameters)
            out = pl_module.training_step(*(batch, 0)[:given])
        found = out.get("loss") if isinstance(out, dict) else out
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise LoraConfigError(f"training_step of {type(pl_module).__name__} gave no loss, but a {kind}")
        return found

    return loss


@contextmanager
def _unlogged(pl_module: pl.LightningModule) -> Iterator[None]:
    """Nothing is logged inside the ``with`` block, where no loop runs that would take it; metrics forget it after."""
    names = [name for name in ("log", "log_dict") if name not in vars(pl_module)]
    vars(pl_module).update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        for name in names:
            vars(pl_module).pop(name, None)
        for part in pl_module.modules():
            if isinstance(part, Metric):
                part.reset()


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for a module's log."""
