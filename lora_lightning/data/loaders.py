"""Batches: padding, and a loader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.encode import IGNORED, Example
from lora_lightning.data.flat import FlatRows
from lora_lightning.strategies.position import Position, Positioned

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
        if isinstance(self.examples, FlatRows):
            return self.examples.lengths()
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


class ResumableLoader(Positioned, DataLoader):  # type: ignore[misc]  # its iterator is no DataLoader's
    """A ``DataLoader`` that can be saved and continued between two batches, with or without ``LoraCallback``.

    Lightning saves and loads the state of loaders that have ``state_dict`` and ``load_state_dict``; others it starts
    again at the first batch of the epoch, and leaves off as many at the end.

    Args:
        *args: Those of a ``DataLoader``, like ``options``.
        trainer: Knows how many batches were trained on, which is fewer than were handed out where batches are fetched
            ahead.
        **options: Those of a ``DataLoader``.
    """

    def __init__(self, *args: Any, trainer: Trainer | None = None, **options: Any) -> None:
        self.position = Position(self, trainer, rows_draw=False)
        super().__init__(*args, **options)


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
