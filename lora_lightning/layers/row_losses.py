"""Losses of rows of logits, and their gradients in the same memory.

Shapes: C rows of a chunk, V tokens in the vocabulary.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What becomes of the products of a head before they are logits: ``z ↦ c · tanh(s · z / c)``, or ``s · z``."""

    scale: float = 1.0
    """``s``."""
    softcap: float | None = None
    """``c``; None: there is no cap."""

    def of(self, products: Tensor) -> Tensor:
        """The logits: a tensor of the same shape."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap


PLAIN_FORM = Form()


class Scoring(NamedTuple):
    """How rows are scored."""

    form: Form = PLAIN_FORM
    label_smoothing: float = 0.0
    """This share of each target is spread evenly over the vocabulary."""


def score_rows(products_CV: Tensor, targets_C: Tensor, scoring: Scoring, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses of rows, (C,), and the gradient of each by its products, (C, V).

    With smoothing ε: ``loss = log Σ exp z − (1 − ε) z_target − ε · mean z``.

    Args:
        products_CV: A head's products, in float32 or float64, which are overwritten.
        targets_C: The tokens to be predicted.
        scoring: How.
        gradient: Whether to work out the gradient; what is returned for it has no meaning otherwise.
    """
    scale = scoring.form.scale
    if scale != 1:
        products_CV *= scale
    kernel = _liger() if gradient and products_CV.is_cuda and products_CV.dtype == torch.float32 else None
    if kernel is None:
        losses_C, d_CV = _score(products_CV, targets_C[:, None], scoring, gradient)
    else:
        losses_C, d_CV = _score_by_liger(kernel, products_CV, targets_C, scoring)
    if gradient and scale != 1:
        d_CV *= scale
    return losses_C, d_CV


def _score(logits: Tensor, targets: Tensor, scoring: Scoring, gradient: bool) -> tuple[Tensor, Tensor]:
    """The same of scaled products, with ``targets`` (C, 1)."""
    cap, smoothing = scoring.form.softcap, scoring.label_smoothing
    slope = None
    if cap is not None:
        logits.mul_(1 / cap).tanh_()
        slope = logits.square().neg_().add_(1) if gradient else None
        logits *= cap
    shift = logits.amax(dim=1, keepdim=True)
    wanted = logits.gather(1, targets).mul_(1 - smoothing)
    if smoothing:
        wanted += smoothing * logits.mean(dim=1, keepdim=True)
    total = logits.sub_(shift).exp_().sum(dim=1, keepdim=True)
    losses = (total.log() + shift - wanted).squeeze(1)
    if gradient:
        logits /= total
        logits.scatter_add_(1, targets, logits.new_full(targets.shape, smoothing - 1))
        if smoothing:
            logits -= smoothing / logits.shape[1]
        if slope is not None:
            logits *= slope
    return losses, logits


def _score_by_liger(kernel: Any, logits: Tensor, targets: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The same by Liger's kernel, which reads and writes the logits once."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        # no weights of classes, the ignored class, no weight of the squared log-sum, smoothing, reduction, cap
        rest = (None, -100, 0.0, scoring.label_smoothing, "none", scoring.form.softcap)
        losses = kernel.apply(leaf, targets, *rest)[0]
        (d,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    return losses.detach(), d


@cache
def _liger() -> Any:
    """Liger's cross-entropy, if it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    if "weight" in inspect.signature(LigerCrossEntropyFunction.forward).parameters:
        return LigerCrossEntropyFunction
    warnings.warn("liger-kernel is older than 0.5 and not used for the loss: pip install -U liger-kernel", stacklevel=2)
    return None
