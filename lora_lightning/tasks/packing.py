"""Training on packed rows: how a model keeps their examples apart is found out by trying, before anything is learned.

Whether a model looks at ``position_ids``, and whether its own mask does, no attribute of it tells; a model that ignores
them lets examples read each other, and nothing fails. So a few tokens are scored packed and apart, and what agrees is
used. A batch is packed if it has ``position_ids`` (B, T), 0 where an example begins, and no ``attention_mask``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import unwrap
from lora_lightning.tasks.generate import evaluating
from lora_lightning.tasks.loss import IGNORED
from lora_lightning.tasks.packed_attention import NAME

Batch = Mapping[str, Tensor]
Score = Callable[[Batch], Tensor]
"""The losses of a batch's trained tokens in their order, (tokens,)."""

LENGTHS = ((9, 14, 6), (20, 7))
"""Of the examples of two rows that are tried."""
WINDOW_TRIED = 512
"""A sliding window or chunk up to this length is reached in the trial."""


def is_packed(batch: Batch) -> bool:
    """Whether the rows of a batch hold several examples each.

    Raises:
        LoraConfigError: They do, and there is a mask, from which transformers would conclude that they do not.
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or positions.ndim != 2 or mask is None:
        return positions is not None and positions.ndim == 2
    if mask.ndim == 2 and ((positions[:, 1:] == 0) & mask[:, 1:].bool() & mask[:, :-1].bool()).any():
        raise LoraConfigError(
            "The rows of a batch are packed (their position_ids begin at 0 more than once), and there is an "
            "attention_mask, under which their examples would see each other: leave it out of the batch."
        )
    return False


@dataclass
class Route:
    """A way to run a model on packed rows."""

    told: str
    """What people are told of it."""
    configs: Sequence[PretrainedConfig] = ()
    """Configs that are switched to this project's attention meanwhile."""
    flatten: bool = False
    """All rows as one, as flash attention wants it."""
    mask: torch.dtype | None = None
    """Give the model a 4-D mask: of bool, or of numbers that are added to the scores."""
    windows: Mapping[str, int | None] = field(default_factory=lambda: {"full_attention": None})
    """The mask's sliding windows, by kind of layer; a model with several kinds takes a mask for each."""
    _before: list[Any] = field(default_factory=list)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the model takes it."""
        if self.flatten:
            names = ("input_ids", "labels", "position_ids")
            return {name: batch[name].reshape(1, -1) for name in names}
        if self.mask is None:
            return batch
        masks = {kind: block_mask(batch["position_ids"], self.mask, window) for kind, window in self.windows.items()}
        mask: Any = masks if len(masks) > 1 else masks["full_attention"]
        return {**batch, "attention_mask": mask}

    def enter(self) -> None:
        """Switch the model's attention; without effect if it is already."""
        if not self._before:
            self._before = [config._attn_implementation for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = NAME

    def leave(self) -> None:
        """Put the model's own attention back."""
        for config, name in zip(self.configs, self._before, strict=False):
            config._attn_implementation_internal = name
        self._before = []


def block_mask(position_ids: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Which tokens of packed rows see which: those before them, of their own example.

    Args:
        position_ids: (B, T), 0 where an example begins.
        dtype: Bool, or that of the model.
        window: A token sees so many, itself among them; None is all.

    Returns:
        (B, 1, T, T): True, or 0, where it is seen; False, or the least number there is, where it is not.
    """
    example_BT = (position_ids == 0).cumsum(dim=-1)
    seen = (example_BT[:, None, :, None] == example_BT[:, None, None, :]).tril()
    seen = seen if window is None else seen.triu(1 - window)
    if dtype is torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def find_route(
    model: PreTrainedModel, score: Score, agreed: Callable[[bool], bool] = bool, device: torch.device | None = None
) -> Route:
    """Find out how a model is trained on packed rows, the cheapest way first.

    Modes of the modules and the states of the random generators are afterwards as they were before.

    Args:
        model: Of transformers, where it will be trained: wrapped, sharded, with its adapters. Where several processes
            hold it, all of them call this.
        score: Runs the model.
        agreed: Whether all processes say so.
        device: Of the batches; None is the model's.

    Raises:
        LoraConfigError: There is no way: the model's layers mix the tokens of a row in ways that cannot be bounded.
    """
    trial = _Trial(model, score, device or model.device)
    reasons = []
    with isolate_rng(), evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        trial.score_apart()
        for route in _routes(model):
            route.enter()
            try:
                reason = trial.objection(route)
            except Exception as error:  # what fails here is of every kind: a shape, an argument, an index
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            finally:
                route.leave()
            if agreed(not reason):
                return route
            reasons.append(f"{route.told}: {reason or 'fails in another process'}")
    raise LoraConfigError(
        f"{type(unwrap(model)).__name__} cannot be trained on packed rows, whose examples would disturb each other: "
        "set data.packing=false. What was tried:\n  " + "\n  ".join(reasons)
    )


def _routes(model: PreTrainedModel) -> Iterator[Route]:
    configs = list(_configs(model))
    own = str(model.config._attn_implementation)
    if "flash" in own:
        yield Route(f"{own} over all rows at once", flatten=True)
        return
    if switched := [config for config in configs if config._attn_implementation == "sdpa"]:
        yield Route("attention example by example", configs=switched)
    yield Route(f"{own} over whole rows with the model's own mask")
    given = Route(f"{own} over whole rows with a given mask", mask=torch.bool if own == "sdpa" else model.dtype)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not _windows(configs):  # one that is given takes the place of all of the model's own
        yield given
    elif kinds == {"full_attention", "sliding_attention"}:
        window = model.config.get_text_config().sliding_window
        yield replace(given, windows={"full_attention": None, "sliding_attention": window})


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return (config for config in found.values() if isinstance(config, PretrainedConfig))


def _windows(configs: Sequence[PretrainedConfig]) -> list[int]:
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
    given = [getattr(config, name, None) for config in configs for name in names]
    return [window for window in given if isinstance(window, int) and window > 0]


class _Trial:
    """A few examples, scored apart in the ordinary way and packed in the ways there may be."""

    def __init__(self, model: PreTrainedModel, score: Score, device: torch.device) -> None:
        self.score, self.device = score, device
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.avoided = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else -1
        self.precise = torch.finfo(model.dtype).bits >= 32 and not torch.is_autocast_enabled(device.type)
        self.epsilon = torch.finfo(model.dtype if self.precise else torch.bfloat16).eps
        reach = [window + 8 for window in _windows(list(_configs(model))) if window <= WINDOW_TRIED]
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

    def objection(self, route: Route) -> str:
        """Why a route is wrong; empty if it is right."""
        packed, changed = (self.score(route.prepare(self._packed(each))) for each in (self.examples, self.changed))
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
