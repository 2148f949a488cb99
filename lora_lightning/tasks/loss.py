"""Losses as sums and counts, so that batches, accumulated batches and devices can be joined exactly.

Shapes: B rows, T tokens a row, K positions that are scored, V tokens in the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


class LossSum(NamedTuple):
    """The loss of a batch before it is averaged."""

    total: Tensor
    """Sum of the losses, with a graph in training."""
    terms: Tensor
    """How many losses are in the sum (int64); may be 0."""
    logits: Tensor
    """What they were computed from."""


class TokenLosses(NamedTuple):
    """The loss of every scored token of a batch of text."""

    losses_BK: Tensor
    """Loss of each position, 0 where it is not trained."""
    trained_BK: Tensor
    """Which positions are trained."""
    logits_BKV: Tensor


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenLosses:
    """Score the labels of a batch under a causal language model.

    The head, the largest layer of a small model, runs only where some row of the batch has a label, if the model's
    forward can leave out the rest.

    Args:
        model: A causal language model of transformers.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), right-padded; ``labels[b, t]`` is the
            label of token t itself, predicted from the tokens before it, -100 where it is not trained.
    """
    targets_BT = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    accepted = _parameters_of(type(model).forward)
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        kept_K = (targets_BT != IGNORED).any(dim=0).nonzero().flatten()
        if not len(kept_K):  # one position keeps shapes and the graph whole
            kept_K = kept_K.new_zeros(1)
        inputs["logits_to_keep"] = kept_K
        targets_BT = targets_BT[:, kept_K]
    logits_BKV = model(**inputs).logits
    losses = functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return TokenLosses(losses.view_as(targets_BT), targets_BT != IGNORED, logits_BKV)


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """Sum the losses of all trained tokens of a batch; see `token_losses`."""
    losses_BK, trained_BK, logits_BKV = token_losses(model, batch)
    return LossSum(losses_BK.sum(), trained_BK.sum(), logits_BKV)


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """Sum the cross-entropies of all rows of a batch.

    Args:
        model: A sequence classifier of transformers.
        batch: What its forward takes, and ``labels`` (B,).
    """
    accepted = _parameters_of(type(model).forward)
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    logits = model(**inputs).logits
    total = functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
    return LossSum(total, torch.tensor(len(logits), device=logits.device), logits)


@cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
