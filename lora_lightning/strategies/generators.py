"""Random number generators that somebody's loader, sampler or data set draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Stream:
    """An iterator that draws from random states of its own, whatever is drawn between two of its items.

    The states begin with a number that torch's global generator would give next; that one is left as it is.

    Args:
        iterator: Draws from the global generators of Python, NumPy and torch.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator = iterator
        ahead = torch.Generator()
        ahead.set_state(torch.get_rng_state())
        seed = int(torch.randint(2**32, (), generator=ahead))
        self.states = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._swap()
        try:
            return next(self.iterator)
        finally:
            self._swap()

    def _swap(self) -> None:
        now = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])
        self.states = now


def generators_of(loader: DataLoader) -> dict[str, Any]:
    """The states of generators that a loader, its samplers and data set have as attributes, by where they are."""
    return {path: _state(generator) for path, generator in _generators(loader)}


def restore_generators(loader: DataLoader, states: dict[str, Any]) -> None:
    """Set them to states that :func:`generators_of` gave."""
    for path, generator in _generators(loader):
        if path in states:
            _restore(generator, states[path])


def _generators(loader: DataLoader) -> Iterator[tuple[str, Any]]:
    owners = {name: getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")}
    todo: list[tuple[str, Any]] = [("generator", loader.generator), *owners.items()]
    seen: set[int] = set()
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            yield path, thing
        elif isinstance(thing, (Sampler, Dataset)) or path in owners:
            todo += [(f"{path}.{name}", value) for name, value in sorted(getattr(thing, "__dict__", {}).items())]


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, list(internal), gauss]
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(state[1]), state[2]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state, generator.get_state(legacy=False)))
    else:
        generator.bit_generator.state = _arrays(state, generator.bit_generator.state)


def _plain(state: Any) -> Any:
    """With tensors for arrays, and Python's numbers: what a checkpoint may hold."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.astype(np.int64))
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any, like: Any) -> Any:
    if isinstance(state, dict):
        return {name: _arrays(value, like[name]) for name, value in state.items()}
    return state.numpy().astype(like.dtype) if isinstance(state, torch.Tensor) else state
