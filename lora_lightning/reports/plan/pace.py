"""How fast this machine is, from a few seconds of products of the model's own shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from lora_lightning.reports.plan.step import Cost

_SHAPES = 4
"""So many of the shapes with the most work are tried; the others are taken to be as fast."""

_FLOPS = 10**10
"""Of one product on a CPU at most, so that several fit into the time."""


class Pace(NamedTuple):
    """What a device does in a second.

    Attributes:
        flops: Floating-point operations of products.
        bytes: Bytes that operations on single elements write.
    """

    flops: float
    bytes: float

    def seconds(self, cost: Cost) -> float:
        """How long a step takes."""
        return cost.flops / self.flops + cost.moved / self.bytes


def calibrate(
    layers: Iterable[tuple[int, int]],
    tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float = 1.2,
    processes: int = 1,
) -> Pace:
    """Time products of layers, and one operation on single elements.

    Args:
        layers: ``(in, out)`` of every linear layer of the model, each as often as it is there; at least one.
        tokens: Of a batch.
        dtype: That products are computed in.
        device: ``cpu`` or ``cuda``.
        seconds: How long it may take, about.
        processes: So many share the machine's CPU, each with its part of the threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // processes))
    try:
        return _measured(layers, tokens, dtype, device, seconds)
    finally:
        torch.set_num_threads(threads)


def _measured(layers: Iterable[tuple[int, int]], tokens: int, dtype: torch.dtype, device: str, seconds: float) -> Pace:
    counts: dict[tuple[int, int], int] = {}
    for sides in layers:
        counts[sides] = counts.get(sides, 0) + 1
    most = sorted(counts, key=lambda sides: -counts[sides] * sides[0] * sides[1])[:_SHAPES]
    work = time_spent = 0.0
    share = seconds / (len(most) + 1)
    make = torch.ones if device == "cpu" else torch.randn  # a GPU's clock goes by what numbers are, a CPU's does not
    for d_in, d_out in most:
        rows = min(tokens, 2048 if device == "cuda" else max(64, _FLOPS // (2 * d_in * d_out)))
        x = make(rows, d_in, dtype=dtype, device=device)
        weight = make(d_out, d_in, dtype=dtype, device=device)
        count = counts[d_in, d_out]
        work += 2.0 * rows * d_in * d_out * count
        time_spent += count * _time(partial(functional.linear, x, weight), share, device)
    y = make(min(tokens, 2048), min((min(sides) for sides in most), default=1024), dtype=dtype, device=device)
    moved = y.numel() * y.element_size() / _time(partial(functional.silu, y), min(share, 1.0), device)
    return Pace(work / time_spent, moved)


def _time(run: Callable[[], object], share: float, device: str) -> float:
    """Seconds of one run: the median of as many as the time allows, after a first one that does not count."""
    seen: list[float] = []
    started = time.perf_counter()
    while not seen or (time.perf_counter() - started < share and len(seen) < 200):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        seen.append(time.perf_counter() - begun)
    seen = sorted(seen[1:] or seen)
    return seen[len(seen) // 2]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
