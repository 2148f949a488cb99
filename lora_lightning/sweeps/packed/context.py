"""What a process has once and each of its jobs is to have for itself, swapped when the baton passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich
import torch

from lora_lightning.strategies import rng
from lora_lightning.sweeps.packed.output import OUTPUT
from lora_lightning.sweeps.runs import JOB

_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", JOB)


class Global(NamedTuple):
    """Something of a process that can be read and set."""

    get: Callable[[], Any]
    set: Callable[[Any], None]


def _variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _VARIABLES}


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


GENERATORS = Global(rng.capture, rng.restore)
VARIABLES = Global(_variables, _set_variables)
# Of a Trainer in precision 64-true it is another one during a step, in which the baton passes.
DTYPE = Global(torch.get_default_dtype, torch.set_default_dtype)
SCREEN = Global(OUTPUT.get, OUTPUT.set)
# Each of Python's threads has a team of OpenMP's of its own, and teams of more threads than there are cores stand in
# each other's way. What a job computes by itself is small: one thread is enough.
THREADS = Global(torch.get_num_threads, torch.set_num_threads)
# The console that Rich has for everybody, on which there is one live display at a time.
CONSOLE = Global(lambda: vars(rich)["_console"], lambda console: vars(rich).__setitem__("_console", console))


class Context:
    """One job's own states: in place inside the context, kept outside of it.

    It begins with what is there when it is made, as a process of the job's own would begin.

    Args:
        screen: What the job prints to; None is the process's own screen.
        more: What else is to be the job's own.
        **variables: Environment variables.

    Attributes:
        threads: How many of torch's threads there are, for a job that computes alone after all.
    """

    def __init__(self, screen: Any = None, *, more: Sequence[Global] = (), **variables: str) -> None:
        self._globals = (GENERATORS, VARIABLES, DTYPE, SCREEN, CONSOLE, THREADS, *more)
        self._own = {each: each.get() for each in self._globals}
        self._own[VARIABLES] |= variables
        self._own[SCREEN], self._own[CONSOLE] = screen, None
        self.threads, self._own[THREADS] = self._own[THREADS], 1
        self._outside: dict[Global, Any] = {}

    def __enter__(self) -> None:
        """Put the job's states in place."""
        self._swap(self._outside, self._own)

    def __exit__(self, *exception: object) -> None:
        """Take them back, and put in place what was there."""
        self._swap(self._own, self._outside)

    def _swap(self, kept: dict[Global, Any], put: Mapping[Global, Any]) -> None:
        for each in self._globals:
            kept[each] = each.get()
            each.set(put[each])

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Let torch draw for the job on a device, outside of its context; what is drawn counts as drawn by it."""
        states = self._own[GENERATORS]
        if device.type == "cuda":
            own = states["cuda"]
            number = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.set_rng_state(own[number], number)
            yield
            own[number] = torch.cuda.get_rng_state(number)
        else:
            torch.set_rng_state(states["torch"])
            yield
            states["torch"] = torch.get_rng_state()

    def drawn(self) -> dict[str, Any]:
        """How far the job's generators are, outside of its context; see `draw_again`."""
        states = self._own[GENERATORS]
        return {**states, "cuda": [*states["cuda"]]} if "cuda" in states else {**states}

    def draw_again(self, states: dict[str, Any]) -> None:
        """Take back what was drawn since `drawn` gave these states."""
        self._own[GENERATORS] = states

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute outside of the job's context in the floating-point type that is its default now."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._own[DTYPE])
        try:
            yield
        finally:
            torch.set_default_dtype(before)
