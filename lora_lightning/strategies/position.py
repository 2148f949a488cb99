"""Where a user's own ``DataLoader`` stands within an epoch, so that a resumed run goes on with the next batch.

Lightning saves and loads the state of loaders that have one; a plain ``DataLoader`` it starts again at the first row,
in another order, and leaves off as many batches at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.strategies import rng


def attach_position(trainer: pl.Trainer) -> None:
    """Let the training loaders of a trainer's further runs know their position.

    A loader keeps its identity and changes its class. Those that have ``state_dict`` already are left alone.
    """
    strategy = trainer.strategy
    if "process_dataloader" not in vars(strategy):
        vars(strategy)["process_dataloader"] = functools.partial(_process, trainer, strategy.process_dataloader)


def _process(trainer: pl.Trainer, process: Callable[[object], object], loader: object) -> object:
    loader = process(loader)
    if trainer.training and isinstance(loader, DataLoader):
        if not hasattr(loader, "state_dict"):
            loader.__class__ = _positioned(type(loader))
        if isinstance(loader, Positioned):
            loader.trainer = trainer
    return loader


class Positioned:
    """Mixin of a ``DataLoader``: the batches of an epoch that are done, and what its order was drawn from.

    It comes after the loader's class, whose layout a changed class has to have.
    """

    __slots__ = ()
    _plain: type[DataLoader]
    """The class that the loader had."""
    trainer: pl.Trainer | None = None
    _began: dict[str, Any] | None = None
    """Random states before this epoch's order was drawn."""
    _handed_out = 0
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # The first epoch's iterator is asked for before the sampler is told its epoch: begin with the first batch.
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        self._began, self._handed_out = self._states(), 0
        if resume is None:
            iterator = self._plain.__iter__(self)  # type: ignore[arg-type]  # it is one of these
        else:
            now = rng.capture()
            self._began = resume
            rng.restore(resume["rng"])
            self._set_generators(resume["generators"])
            iterator = self._plain.__iter__(self)  # type: ignore[arg-type]
            self._pass_over(iterator, resume["done"])
            rng.restore(now)
        for batch in iterator:
            self._handed_out += 1
            yield batch

    def _pass_over(self, iterator: Any, batches: int) -> None:
        in_this_process = self.num_workers == 0 and not isinstance(self.dataset, IterableDataset)  # type: ignore[attr-defined]
        for _ in range(batches):
            # Workers load what they pass over: only so do they draw at random what they drew before.
            iterator._next_index() if in_this_process else next(iterator)
        self._handed_out = batches

    def state_dict(self) -> dict[str, Any]:
        """The position of every process; all of them have to call it, as they do where a checkpoint is saved."""
        mine = self._position()
        everyone = [mine]
        if dist.is_available() and dist.is_initialized():
            everyone = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        return {"processes": everyone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; that of the first process, where there were fewer of them than now."""
        everyone = state["processes"]
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        position = everyone[rank] if rank < len(everyone) else everyone[0]
        if position["done"]:
            self._resume = position
        else:
            self._set_generators(position["generators"])

    def _position(self) -> dict[str, Any]:
        done = self._done()
        return {**(self._began if done and self._began else self._states()), "done": done}

    def _done(self) -> int:
        if self.trainer is None:
            return self._handed_out
        fit = self.trainer.fit_loop
        progress, fetcher = fit.epoch_loop.batch_progress, fit._data_fetcher
        current = progress.current
        if fetcher is None or (progress.is_last_batch and current.processed == current.ready):
            return 0  # the epoch is over
        waiting = fetcher.fetched - current.ready  # fetched ahead, to see whether there is another
        return max(self._handed_out - waiting - (current.ready - current.processed), 0)

    def _states(self) -> dict[str, Any]:
        return {"rng": rng.capture(), "generators": [generator.get_state() for generator in self._generators()]}

    def _generators(self) -> list[torch.Generator]:
        """Those that the user has given: to the loader, its sampler, or that of its batches."""
        batches = getattr(self, "batch_sampler", None)
        owners = (self, getattr(self, "sampler", None), batches, getattr(batches, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)


class PositionedLoader(DataLoader, Positioned):
    """A plain ``DataLoader`` that knows its position."""

    _plain = DataLoader
    __iter__ = Positioned.__iter__  # type: ignore[assignment]


@functools.cache
def _positioned(kind: type[DataLoader]) -> type:
    if kind is DataLoader:
        return PositionedLoader
    return type(f"Positioned{kind.__name__}", (kind, Positioned), {"_plain": kind, "__iter__": Positioned.__iter__})
