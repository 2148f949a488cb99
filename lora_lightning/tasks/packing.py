"""Training on packed rows: how a model keeps their examples apart is found out by trying, before anything is learned.

Whether a model looks at ``position_ids``, and whether its own mask does, no attribute of it tells; a model that ignores
them lets examples read each other, and nothing fails. So a few tokens are scored packed and apart, and what agrees is
used. A batch is packed if it has ``position_ids`` (B, T), 0 where an example begins, and no ``attention_mask``.
"""

from __future__ import annotations

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
from lora_lightning.tasks.packed_attention import NAME
from lora_lightning.tasks.packed_trial import Batch, Score, Trial, configs_of, windows_of


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
    trial = Trial(model, score, device or model.device)
    reasons = []
    with isolate_rng(), evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        trial.score_apart()
        for route in _routes(model):
            route.enter()
            try:
                reason = trial.objection(route.prepare)
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
    configs = list(configs_of(model))
    own = str(model.config._attn_implementation)
    if "flash" in own:
        yield Route(f"{own} over all rows at once", flatten=True)
        return
    if switched := [config for config in configs if config._attn_implementation == "sdpa"]:
        yield Route("attention example by example", configs=switched)
    yield Route(f"{own} over whole rows with the model's own mask")
    given = Route(f"{own} over whole rows with a given mask", mask=torch.bool if own == "sdpa" else model.dtype)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not windows_of(configs):  # one that is given takes the place of all of the model's own
        yield given
    elif kinds == {"full_attention", "sliding_attention"}:
        window = model.config.get_text_config().sliding_window
        yield replace(given, windows={"full_attention": None, "sliding_attention": window})
