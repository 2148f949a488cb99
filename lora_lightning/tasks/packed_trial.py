"""A few examples scored packed and apart, to see whether a way to run packed rows is right for a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lora_lightning.tasks.loss import IGNORED

Batch = Mapping[str, Tensor]
Score = Callable[[Batch], Tensor]
"""The losses of a batch's trained tokens in their order, (tokens,)."""

LENGTHS = ((9, 14, 6), (20, 7))
"""Of the examples of two rows that are tried."""
WINDOW_TRIED = 512
"""A sliding window or chunk up to this length is reached in the trial."""


def configs_of(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """The configs of a model and of its parts, each once."""
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return (config for config in found.values() if isinstance(config, PretrainedConfig))


def windows_of(configs: Sequence[PretrainedConfig]) -> list[int]:
    """The sliding windows and chunks that configs speak of, in tokens."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
    given = [getattr(config, name, None) for config in configs for name in names]
    return [window for window in given if isinstance(window, int) and window > 0]


class Trial:
    """A few examples, scored apart in the ordinary way and packed in the ways there may be."""

    def __init__(self, model: PreTrainedModel, score: Score, device: torch.device) -> None:
        self.score, self.device = score, device
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.avoided = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else -1
        self.precise = torch.finfo(model.dtype).bits >= 32 and not torch.is_autocast_enabled(device.type)
        self.epsilon = torch.finfo(model.dtype if self.precise else torch.bfloat16).eps
        reach = [window + 8 for window in windows_of(list(configs_of(model))) if window <= WINDOW_TRIED]
        self.lengths = [[*lengths] for lengths in LENGTHS]
        self.lengths[0][1] = max(self.lengths[0][1], *reach, 0)
        self.lengths[1][0] = max(self.lengths[1][0], *reach, 0)
        count = sum(map(sum, self.lengths))
        self.examples = self._examples(range(count))
        first, *others = self.examples
        self.changed = [*self._examples(range(count, count + len(first))), *others]
        """The same, but for the tokens of the first."""

    def score_apart(self) -> None:
        """Score in the ordinary way: the truth, and how much arithmetic alone changes of it."""
        ordinary = self.score(self._padded(self.examples))
        self.apart = torch.cat([self.score(self._padded([example])) for example in self.examples])
        self.noise = _size(ordinary - self.apart)
        behind = len(self.examples[0]) - 1
        changed = self.score(self._padded(self.changed))
        self.leak_noise = _size((changed - ordinary)[behind:])

    def objection(self, prepare: Callable[[Batch], Batch]) -> str:
        """Why the model as it now stands is wrong for packed rows, so prepared; empty if it is right."""
        packed, changed = (self.score(prepare(self._packed(each))) for each in (self.examples, self.changed))
        size, behind = _size(self.apart), len(self.examples[0]) - 1
        if not math.isfinite(size):
            return "the losses of a few examples apart are not finite"
        leak = _size((changed - packed)[behind:])
        if not leak <= 10 * self.leak_noise + torch.finfo(torch.float32).eps * size * (1 if self.precise else 8):
            return f"an example's loss changes by {leak:.2g} with the tokens of another in its row"
        error = _size(packed - self.apart)
        if not error <= 10 * self.noise + self.epsilon * size * (16 if self.precise else 2):
            return f"losses differ by {error:.2g} from those of the examples apart"
        return ""

    def _examples(self, numbers: range) -> list[Tensor]:
        tokens = torch.tensor([(7919 * number + 13) % self.vocabulary for number in numbers], device=self.device)
        tokens[tokens == self.avoided] = (self.avoided + 1) % self.vocabulary
        lengths = [length for row in self.lengths for length in row]
        return list(tokens.split(lengths if sum(lengths) == len(tokens) else len(tokens)))

    def _padded(self, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        width = max(map(len, examples))
        rows = [_padded_to(width, example, torch.ones_like(example), _labels(example)) for example in examples]
        return {
            name: torch.stack(column)
            for name, column in zip(("input_ids", "attention_mask", "labels"), zip(*rows, strict=True), strict=True)
        }

    def _packed(self, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        width, left, rows = max(map(sum, self.lengths)) + 3, iter(examples), []
        for lengths in self.lengths:
            parts = [next(left) for _ in lengths]
            parts.append(parts[0].new_zeros(width - sum(lengths)))
            labels = [*map(_labels, parts[:-1]), torch.full_like(parts[-1], IGNORED)]
            positions = [torch.arange(len(part), device=self.device) for part in parts]
            rows.append([torch.cat(each) for each in (parts, labels, positions)])
        names = ("input_ids", "labels", "position_ids")
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _labels(example: Tensor) -> Tensor:
    return torch.cat([example.new_tensor([IGNORED]), example[1:]])


def _padded_to(width: int, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    missing = (0, width - len(ids))
    pad = torch.nn.functional.pad
    return pad(ids, missing), pad(mask, missing), pad(labels, missing, value=IGNORED)


def _size(losses: Tensor) -> float:
    """Root of the mean square; not a number, which is no less than anything, if one of them is none."""
    return math.sqrt(float(losses.double().square().mean()))
