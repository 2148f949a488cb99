"""What layers are called on while batches run through a model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def watched(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have ``take(name, input)`` called for each call of each layer inside the ``with`` block."""
    handles = [
        layer.register_forward_hook(functools.partial(_hook, name, take), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, take: Callable[[str, Tensor], None], module: nn.Module, args: tuple, kwargs: dict, out: object
) -> None:
    take(name, (args[0] if args else next(iter(kwargs.values()))).detach())


def leaders_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, str]:
    """For each layer the first one that is called on the same input in a run: itself, where none is.

    The same tensor, not equal values: query, key and value projections have one.
    """
    leader: dict[str, str] = {name: name for name in layers}
    known: dict[int, tuple[weakref.ref[Any], str]] = {}

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        there, first = known.get(id(x), (None, name))
        if there is not None and there() is x:
            leader[name] = first
        else:
            known[id(x)] = (weakref.ref(x), name)

    handles = [
        layer.register_forward_hook(functools.partial(hook, name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return leader


def scored(x: Tensor, batch: Any, masked: int | None) -> Tensor:
    """The rows ``(n, d)`` of a layer's input that stand for tokens of a batch: not padding, nor masked labels.

    Args:
        x: ``(..., d)``.
        batch: With ``attention_mask`` and ``labels``, as far as it has them; else every row counts.
        masked: The label that marks tokens to leave out; None leaves none out.
    """
    rows = x.reshape(-1, x.shape[-1])
    kept = kept_tokens(batch, masked)
    if kept is None or kept.numel() != len(rows) or (x.dim() == kept.dim() + 1 and x.shape[:-1] != kept.shape):
        return rows
    return rows[kept.reshape(-1).to(rows.device)]


def kept_tokens(batch: Any, masked: int | None) -> Tensor | None:
    """Which tokens of a batch count, in the shape of ``input_ids``; None where it does not say."""
    if not isinstance(batch, Mapping) or not isinstance(ids := batch.get("input_ids"), Tensor):
        return None
    kept = torch.ones_like(ids, dtype=torch.bool)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        kept &= mask.bool()
    if masked is not None and isinstance(labels, Tensor) and labels.shape == ids.shape:
        kept &= labels != masked
    return kept
