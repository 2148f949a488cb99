"""Losses as sums and counts, so that batches, accumulated batches and devices can be joined exactly.

Shapes: B rows, T tokens a row, K positions that are scored, V tokens in the vocabulary.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import unwrap
from lora_lightning.tasks.head import logits_of, needs_all_logits, root_of, run_model

IGNORED = -100


class LossSum(NamedTuple):
    """The loss of a batch before it is averaged."""

    total: Tensor
    """Sum of the losses, with a graph in training."""
    terms: Tensor
    """How many losses are in the sum (int64); may be 0."""
    logits: Tensor | None = None
    """What they were computed from, where somebody reads it."""
    items: Tensor | int | None = None
    """What the mean divides by, if not by ``terms``."""

    @property
    def mean(self) -> Tensor:
        """The mean loss, 0 where there is none: what a ``training_step`` returns."""
        return self.total / (self.terms.clamp(min=1) if self.items is None else self.items)


class TokenLosses(NamedTuple):
    """The loss of every scored token of a batch of text."""

    losses_K: Tensor
    """In the order of rows, then positions: those of ``batch["labels"][:, 1:] != -100``."""
    outputs: Any
    """What the model returned; its logits are not what they are called, unless they had to be made."""


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> LossSum:
    """Sum the losses of all labelled tokens of a batch; ``causal_lm_loss(model, batch).mean`` is the loss to train on.

    It equals transformers' ``model(**batch).loss``, the auxiliary loss of a mixture of experts included, without making
    the logits: the head is computed where there is a label, a few rows at a time; see `token_losses`.

    Args:
        model: A causal language model of transformers, wrapped or not; or any module that returns logits.
        batch: ``input_ids`` and ``labels``, (B, T), and whatever else the model's forward takes; ``labels[b, t]`` is
            the label of token t itself, predicted from the tokens before it, -100 where it is not trained.
        num_items_in_batch: What the mean divides by instead of the number of labels: that of all accumulated batches,
            a number or a tensor of one, ().
        label_smoothing: This share of each target is spread evenly over the vocabulary.

    Raises:
        LoraConfigError: The batch has no labels or nothing that the model takes, or the model is no causal one.
    """
    losses_K, outputs = token_losses(model, batch, label_smoothing=label_smoothing)
    total = losses_K.sum()
    if (auxiliary := getattr(outputs, "aux_loss", None)) is not None:
        # It is added to the mean; here it is one for each term, so that it is still there once the sum is divided.
        total = total + _auxiliary_weight(root_of(model)) * auxiliary.to(total) * len(losses_K)
    terms = torch.full((), len(losses_K), device=total.device)
    return LossSum(total, terms, None, num_items_in_batch)


def token_losses(model: nn.Module, batch: Mapping[str, Any], *, label_smoothing: float = 0.0) -> TokenLosses:
    """Score the labels of a batch under a causal language model.

    Where the model's logits are those of its output layer, maybe scaled and soft-capped, they are never made as a whole
    (:mod:`lora_lightning.tasks.head`). Where something reads them, or the model does more to them, its own forward
    makes them all. Where only the head is of a kind that is not known here, or an engine's hooks are on it, they are
    made for the positions where some row has a label, if the model can leave out the rest.

    Args:
        model: As for `causal_lm_loss`.
        batch: As for `causal_lm_loss`.
        label_smoothing: As for `causal_lm_loss`.

    Raises:
        LoraConfigError: As for `causal_lm_loss`.
    """
    if "labels" not in batch:
        raise LoraConfigError(f"the loss needs the batch's labels, (B, T); it has {', '.join(batch) or 'nothing'}")
    root = root_of(model)
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise LoraConfigError(
            f"{type(root).__name__} is an encoder-decoder, whose labels are not those of its input's next tokens: take "
            "its own loss, model(**batch).loss"
        )
    accepted = accepted_by(model, root)
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    if not inputs:
        raise LoraConfigError(
            f"the forward of {type(unwrap(model)).__name__} takes {', '.join(sorted(accepted))}, and the batch has "
            f"none of that: {', '.join(batch)}"
        )
    inputs |= {key: value for key, value in (("use_cache", False), ("return_dict", True)) if key in accepted}
    targets_BT = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    at_K = (targets_BT != IGNORED).flatten().nonzero().flatten()
    answer = run_model(model, inputs, targets_BT, at_K, label_smoothing)
    if answer is None:
        if "logits_to_keep" in accepted and not needs_all_logits(model):
            targets_BT = _leave_out(inputs, targets_BT)
        answer = model(**inputs), None
    outputs, losses_K = answer
    if losses_K is None:
        logits_BTV = logits_of(outputs)
        targets_BT = targets_BT.to(logits_BTV.device)
        scored_BT = targets_BT != IGNORED
        logits_KV = logits_BTV[scored_BT]
        logits_KV = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
        losses_K = functional.cross_entropy(
            logits_KV, targets_BT[scored_BT], reduction="none", label_smoothing=label_smoothing
        )
    return TokenLosses(losses_K, outputs)


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """Sum the cross-entropies of all rows of a batch.

    Args:
        model: A sequence classifier of transformers.
        batch: What its forward takes, and ``labels`` (B,).
    """
    accepted = accepted_by(model, model)
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    logits = model(**inputs).logits
    total = functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
    return LossSum(total, torch.tensor(len(logits), device=logits.device), logits)


def _leave_out(inputs: dict[str, Any], targets_BT: Tensor) -> Tensor:
    """Have logits made only for positions where some row has a label; gives the targets there."""
    kept = (targets_BT != IGNORED).any(dim=0).nonzero().flatten()
    if not len(kept):  # one position keeps shapes and the graph whole
        kept = kept.new_zeros(1)
    inputs["logits_to_keep"] = kept
    return targets_BT[:, kept]


def accepted_by(model: nn.Module, root: nn.Module) -> set[str]:
    """The names that a model's forward takes: its own, those of its typed ``**kwargs``, or the inner model's."""
    module = unwrap(model)
    names: set[str] = set()
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names |= {parameter.name} if parameter.kind is not parameter.VAR_POSITIONAL else set()
        elif typing.get_origin(parameter.annotation) in (Unpack, getattr(typing, "Unpack", Unpack)):
            names |= set(typing.get_args(parameter.annotation)[0].__annotations__)
    return names if names or module is root else accepted_by(root, root)


def _auxiliary_weight(root: nn.Module) -> float:
    """What a mixture of experts multiplies its auxiliary loss with."""
    config = getattr(root, "config", None)
    for place in (root, config, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(value := getattr(place, name, None), (int, float)):
                return value
    raise LoraConfigError(
        f"{type(root).__name__} returns an aux_loss but has no router_aux_loss_coef to weigh it with: set "
        "model.config.router_aux_loss_coef (0.0 leaves it out)"
    )
