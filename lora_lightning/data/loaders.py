"""Batches: padding, and a loader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.encode import IGNORED, Example
from lora_lightning.data.samplers import LengthGroupedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Rows(Dataset):
    """Encoded examples by number. A number beyond the last is a filler: an example without labels, that weighs nothing.

    Args:
        examples: In order.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        example = self.examples[number % len(self.examples)]
        if number < len(self.examples):
            return example
        return {**example, "labels": torch.full_like(example["labels"], IGNORED)}

    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]


class Collator:
    """Pads examples at the right into one batch.

    Args:
        pad_token_id: Stands where there is no token; ``attention_mask`` is 0 there.
        pad_to_multiple_of: Round lengths up to a multiple of this (tensor cores like 8).
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int | None = None) -> None:
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Stacks examples.

        Args:
            examples: B of them.

        Returns:
            ``input_ids``, ``attention_mask`` and whatever else the examples have, each (B, T) int64; ``labels`` (B,)
            where an example has only one.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        width = -(-max(lengths) // self.multiple) * self.multiple
        batch = {
            "attention_mask": torch.arange(width).expand(len(examples), width).lt(torch.tensor(lengths)[:, None]).long()
        }
        for name, first in examples[0].items():
            if first.ndim == 0:
                batch[name] = torch.stack([example[name] for example in examples]).long()
                continue
            batch[name] = torch.full((len(examples), width), self.padding.get(name, 0))
            for row, example in zip(batch[name], examples, strict=True):
                row[: len(example[name])] = example[name]
        return batch


class ResumableLoader(DataLoader):
    """A ``DataLoader`` that can be saved and continued between two batches.

    Lightning saves and loads the state of loaders that have ``state_dict`` and ``load_state_dict``; others it starts
    again at the first batch of the epoch, and leaves off as many at the end.
    """

    trainer: Trainer | None = None
    """Knows how many batches were trained on, which is fewer than were handed out where batches are fetched ahead."""
    _handed_out = 0
    _resume_at: tuple[int, int] | None = None
    """Epoch and batch at which the next iteration begins; None leaves both to others."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # The first epoch's iterator is asked for before the sampler is told its epoch, and workers would read the
        # order at once: so the work begins with the first batch (a generator), but where to begin is settled here.
        # Once resumed, epochs are counted here: Lightning counts one twice if resumed at its end under `max_steps`.
        at = self._resume_at
        if at is not None:
            self._resume_at = (at[0] + 1, 0)
        return self._batches(at)

    def _batches(self, at: tuple[int, int] | None) -> Iterator[Any]:
        start = at[1] if at else 0
        self._handed_out = start
        if isinstance(self.sampler, LengthGroupedSampler):
            if at:
                self.sampler.set_epoch(at[0])
            self.sampler.skip, start = start * self.sampler.batch_size, 0  # without loading what is skipped
        for batch in islice(super().__iter__(), start, None):
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands: its number, and the batches of it that are done."""
        done = self._handed_out
        if self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            done = progress.current.processed  # type: ignore[attr-defined]
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration begin behind the batches that are done, and those after it at the next epochs."""
        self._resume_at = (state["epoch"], state["batches"])


def loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    """Options that all loaders share.

    Args:
        num_workers: Processes that load; they stay between epochs.
        seed: Of the loader's own generator: without one, every iteration takes a number from torch's global one, and
            a resumed run's dropout would differ.
    """
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator().manual_seed(seed),
    }
