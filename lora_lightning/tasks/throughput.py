"""How fast a run trains, without asking the device at every step."""

from __future__ import annotations

import time

from torch import Tensor


class Throughput:
    """Tokens a second over the time spent training.

    Waiting for data counts; validation (between `pause` and `resume`) and the first step (warming up, compiling) do
    not. Counts may be tensors on the device: nothing is copied until somebody looks at the value.
    """

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._tokens: Tensor | None = None
        self._seconds = 0.0
        self._mark: float | None = None
        self._paused: float | None = None

    def add(self, tokens: Tensor) -> None:
        """Count the tokens of one step, at its end."""
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds += now - self._mark
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
        self._mark = now

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Let the clock go on where it stopped."""
        if self._mark is not None and self._paused is not None:
            self._mark += time.perf_counter() - self._paused
        self._paused = None

    @property
    def rate(self) -> Tensor | None:
        """Tokens a second so far; None before the second step's end."""
        return None if self._tokens is None else self._tokens / self._seconds
