"""Where a training loader stands within an epoch, so that a resumed run goes on with the very next batch.

Lightning saves and loads the state of loaders that have one; a plain ``DataLoader`` it starts again at the first row,
in another order, and leaves off as many batches at the end.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.strategies import rng
from lora_lightning.strategies.dealing import dealt, dealt_anew
from lora_lightning.strategies.generators import Stream, generators_of, restore_generators
from lora_lightning.strategies.ranks import first_with_same_rows, of_all_ranks
from lora_lightning.strategies.skipping import Numbers, Skipping


def attach_position(trainer: pl.Trainer) -> None:
    """Let the training loaders of a trainer's further runs know their position.

    Loaders that have ``state_dict`` already are left alone, and a user's own object stays as it is: what the trainer
    gets is a loader with the same attributes and a class that knows more.
    """
    strategy = trainer.strategy
    vars(strategy)["process_dataloader"] = functools.partial(_process, trainer, type(strategy).process_dataloader)


def resume_position(trainer: pl.Trainer, state: dict[str, Any] | None) -> None:
    """Load positions that Lightning has left out, and begin anew; call it when training starts.

    It leaves them out where the loaders were made before the checkpoint was read (``estimated_stepping_batches`` in
    ``configure_optimizers``), and at the end of an epoch, when generators of a sampler's own have still to be put back.

    Args:
        trainer: Of the resumed run.
        state: The random state of the checkpoint, from which the iterator is made.
    """
    loop = trainer.fit_loop
    vars(loop.epoch_loop.val_loop)["increment_progress_to_evaluation_end"] = functools.partial(_pass_over, trainer)
    states, combined = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or combined is None:
        return
    if loop.restarting:
        loop._load_combined_loader_states()
    else:
        loaders = [loader for loader in combined.flattened if hasattr(loader, "load_state_dict")]
        for loader, position in zip(loaders, states, strict=False):
            if isinstance(loader, Positioned):
                loader.load_state_dict(position)
        loop._combined_loader_states_to_load = []
    if state is not None:
        rng.restore(state)
    if loop._data_fetcher is not None:
        iter(loop._data_fetcher)


def _pass_over(trainer: pl.Trainer) -> None:
    """Pass over a validation that came after the checkpoint; iterators are made for it, and those draw a number."""
    now, loop = rng.capture(), trainer.fit_loop.epoch_loop.val_loop
    type(loop).increment_progress_to_evaluation_end(loop)
    rng.restore(now)


def _process(trainer: pl.Trainer, process: Callable[..., object], loader: object) -> object:
    loader = process(trainer.strategy, loader)
    if not trainer.training or not isinstance(loader, DataLoader):
        return loader
    if hasattr(loader, "state_dict"):
        if isinstance(loader, Positioned):
            loader.position.trainer = trainer
        return loader
    kind: Any = type(loader)
    knowing: Any = object.__new__(_positioned(kind))
    knowing.__dict__ = loader.__dict__  # what is changed in one is changed in the other
    knowing.position = Position(knowing, trainer)
    return knowing


@functools.cache
def _positioned(kind: Any) -> type[Any]:
    return type(f"Positioned{kind.__name__}", (Positioned, kind), {"__slots__": ("position",)})


class Positioned:
    """Mixin of a ``DataLoader``, which goes before it, that lets it be saved and continued between two batches."""

    position: Position

    def __iter__(self) -> Iterator[Any]:
        return self.position.batches()

    def state_dict(self) -> dict[str, Any]:
        """The position of every process; all of them have to call it, as they do where a checkpoint is saved."""
        return {"processes": of_all_ranks(self.position.now())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; that of another process where there were fewer of them."""
        everyone = state["processes"]
        trainer = self.position.trainer
        rank = first_with_same_rows(None if trainer is None else trainer.strategy)
        self.position.at = dealt_anew(everyone[rank % len(everyone)], cast("DataLoader", self), trainer)

    def _plain_iterator(self) -> Iterator[Any]:
        return super().__iter__()  # type: ignore[misc]

    @property
    def _index_sampler(self) -> Any:  # what the iterator takes the rows' numbers from
        return Skipping(super()._index_sampler, self.position)  # type: ignore[misc]


class Position:
    """What an epoch's order was drawn from, and how many of its batches are done.

    Args:
        loader: Whose position it is.
        trainer: Knows how many batches were trained on, which is fewer than were handed out where they are fetched
            ahead.
        rows_draw: Whether rows may be drawn at random, so that workers have to load what is passed over: only so do
            they draw again what they drew.
    """

    def __init__(self, loader: Any, trainer: pl.Trainer | None = None, *, rows_draw: bool = True) -> None:
        self.loader = loader
        self.trainer = trainer
        self.rows_draw = rows_draw
        self.at: dict[str, Any] | None = None
        """Where the next iteration begins; None is at the first batch, in an order drawn then."""
        self.skip: int | None = None
        self.numbers: Numbers | None = None
        self._epoch, self._shift, self._handed_out, self._ran_out = 0, 0, 0, False
        self._began: dict[str, Any] | None = None
        self._places: deque[int] = deque(maxlen=8)
        self._resumed = False
        self._ahead = 0
        self._steps: int | None = None

    # ---- iterating

    def batches(self) -> Iterator[Any]:
        """The epoch's batches, or those that are left of it.

        The work begins with the first of them: Lightning asks for the first epoch's iterator before the sampler is
        told its epoch, and sometimes before the checkpoint is read.
        """
        at, self.at = self.at or self._unused(), None
        self._set_epoch(at)
        resumed = at is not None
        if at is not None and (at["finished"] or at["began"] is None):
            restore_generators(self.loader, at["generators"])
            at = None
        self._handed_out = at["batches"] if at else 0
        self._places.clear()
        iterator = self._begin(resumed=resumed) if at is None else self._begin_again(at)
        for batch in iterator:
            self._handed_out += 1
            self._note()
            yield batch
        self._ran_out = True

    def _begin(self, *, resumed: bool) -> Iterator[Any]:
        loader = self.loader
        self._began = {
            "rng": _without_devices(rng.capture()),
            "generators": generators_of(loader),
            "workers_stay": loader.persistent_workers and (resumed or loader._iterator is not None),
        }
        self._steps = self._steps_begun()
        return self._open()

    def _begin_again(self, at: dict[str, Any]) -> Iterator[Any]:
        self._began = at["began"]
        now = rng.capture()
        rng.restore(at["began"]["rng"])
        restore_generators(self.loader, at["began"]["generators"])
        by_number = self._skips_by_number()
        self.skip = at["batches"] if by_number else None
        iterator = self._open()
        self.skip = None
        if by_number and self.numbers is not None:
            self.numbers.begin()
        else:
            deque(islice(iterator, at["batches"]), maxlen=0)
        rng.restore(now)
        if by_number:
            # Rows that were not loaded have not drawn: a data set's own generator is where it was.
            restore_generators(self.loader, at["generators"])
        if at["ran_out"]:
            self._tell_ran_out()
        return iterator

    def _open(self) -> Iterator[Any]:
        own = self.loader.generator
        if self._began is not None and self._began["workers_stay"]:
            self.loader.generator = torch.Generator()  # workers that stay take no seed for a further epoch
        iterator = self.loader._plain_iterator()
        self.loader.generator = own
        # What is drawn here for one batch after the other would hang on what the model draws between them.
        return Stream(iterator) if self._draws_on() else iterator

    def _unused(self) -> dict[str, Any] | None:
        """The beginning of an epoch, once more: a resumed trainer may make an iterator, fetch, and make another."""
        if self._resumed and self._began is not None and self._steps == self._steps_begun() is not None:
            return {**self.now(), "batches": 0, "finished": False, "generators": self._began["generators"]}
        return None

    def _steps_begun(self) -> int | None:
        progress = self._progress()
        return None if progress is None else progress.total.ready

    def _skips_by_number(self) -> bool:
        if isinstance(self.loader.dataset, IterableDataset):
            return False
        return not self.rows_draw or (self.loader.num_workers == 0 and not self._draws_on())

    def _draws_on(self) -> bool:
        """Whether batches are drawn one from another, or ahead of their training step."""
        unsized = sized_len(self.loader) is None  # Lightning then fetches ahead, to know which is the last
        return self.loader.num_workers > 0 or unsized or isinstance(self.loader.dataset, IterableDataset)

    def _set_epoch(self, at: dict[str, Any] | None) -> None:
        epoch = self._epoch_of_trainer()
        if at is not None:
            # Lightning counts an epoch twice if it is resumed at its end under `max_steps`.
            self._shift = at["epoch"] + at["finished"] - epoch if self.trainer is not None else 0
            self._resumed, self._ran_out = True, at["ran_out"] and not at["finished"]
            epoch = at["epoch"] if self.trainer is None else epoch
        if epoch + self._shift != self._epoch:
            self._epoch, self._ran_out = epoch + self._shift, False
        if self._resumed:
            _set_sampler_epoch(self.loader, self._epoch)

    def _epoch_of_trainer(self) -> int:
        if self.trainer is None:
            return getattr(self.loader.sampler, "epoch", 0)
        return self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]

    # ---- counting

    def now(self) -> dict[str, Any]:
        """The position as a checkpoint may hold it."""
        if self.at is not None:
            return self.at
        return {
            "epoch": self._epoch,
            "batches": self._handed_out - self._not_done(),
            "finished": self._finished(),
            "ran_out": self._ran_out,
            "began": self._began,
            "generators": generators_of(self.loader),
            "dealt": dealt(self.loader, self.trainer),
        }

    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer is not None else None

    def _finished(self) -> bool:
        progress = self._progress()
        return progress is not None and progress.is_last_batch and progress.current.ready == progress.current.processed

    def _not_done(self) -> int:
        """Batches that were handed out and not trained on: fetched ahead, or in a step that has been broken off."""
        if self.trainer is None:
            return 0
        loop, current = self.trainer.fit_loop, self._progress().current
        fetcher, under_way = loop._data_fetcher, current.ready - current.processed
        modes = None if loop._combined_loader is None else loop._combined_loader._iterator
        if fetcher is None or modes is None:  # after the fit
            return 0 if self._finished() else self._ahead + under_way
        done = modes._idx - len(getattr(fetcher, "batches", ())) - under_way
        return sum(place >= done for place in self._places)

    def _note(self) -> None:
        """Note which of the trainer's batches has a part of this loader: others may be shorter or longer."""
        if self.trainer is not None and (combined := self.trainer.fit_loop._combined_loader) is not None:
            modes, fetcher = combined._iterator, self.trainer.fit_loop._data_fetcher
            self._places.append(0 if modes is None else modes._idx)
            self._ahead = getattr(fetcher, "prefetch_batches", 0) if getattr(fetcher, "length", 0) is None else 0

    def _tell_ran_out(self) -> None:
        """A shorter loader that has begun again is known as such, or its epoch would last until it ends once more."""
        combined = None if self.trainer is None else self.trainer.fit_loop._combined_loader
        consumed = None if combined is None else getattr(combined._iterator, "_consumed", None)
        if combined is not None and consumed is not None:
            consumed[combined.flattened.index(self.loader)] = True


def _without_devices(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "cuda"}
