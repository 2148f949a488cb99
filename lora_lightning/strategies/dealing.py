"""How rows are dealt to processes, and what a place in an epoch becomes where another number of them goes on."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, DistributedSampler


def dealt(loader: DataLoader, trainer: pl.Trainer | None) -> dict[str, Any]:
    """What a checkpoint says of it: rows that all processes take at one batch, whose order, and batches done."""
    samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    replicas = max(int(getattr(sampler, "num_replicas", 1)) for sampler in samplers)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    kind = next((s for s in samplers if isinstance(s, DistributedSampler)), loader.sampler)
    by_length = f" with {replicas * size} rows a step" if getattr(kind, "lengths", None) is not None else ""
    return {
        "rows": replicas * size,
        "order": type(kind).__name__ + by_length,
        "done": 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current.processed,  # type: ignore[attr-defined]
    }


def dealt_anew(at: dict[str, Any], loader: DataLoader, trainer: pl.Trainer | None) -> dict[str, Any]:
    """A saved position where batches may be of another size, or more or fewer processes take them.

    So many rows of the epoch count as done as were done, rounded down to whole optimizer steps, and Lightning's own
    count of the epoch's batches is put right: it would end the epoch too early, or go beyond its end.
    """
    now, then = dealt(loader, trainer), at.get("dealt", {})
    if not then:
        return at
    if at["batches"] and not at["finished"] and now["order"] != then["order"]:
        warnings.warn(
            f"the checkpoint stands within an epoch in the order of a {then['order']}, here a {now['order']} goes on: "
            "as many rows are left of the epoch, but some come twice and others not. In further epochs all come once",
            stacklevel=2,
        )
    if now["rows"] == then["rows"]:
        return at
    if at["finished"]:
        _recount(trainer, then["done"], max(then["done"], sized_len(loader) or 0))
        return at
    steps_of = 1 if trainer is None else trainer.accumulate_grad_batches
    last = (sized_len(loader) or 2**62) - 1
    batches, done = (
        _whole(min(n * then["rows"] // now["rows"], last), steps_of) for n in (at["batches"], then["done"])
    )
    _recount(trainer, then["done"], done)
    return {**at, "batches": batches}


def _whole(batches: int, steps_of: int) -> int:
    return batches - batches % steps_of


def _recount(trainer: pl.Trainer | None, before: int, after: int) -> None:
    if trainer is None:
        return
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    for name in ("ready", "started", "processed", "completed"):
        number = getattr(current, name)
        # A batch that is under way, or whose end has not been noted, is counted by some of these only.
        setattr(current, name, max(after + number - before, 0))
