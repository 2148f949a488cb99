"""Gradients of a contender against float64: nothing is timed before they are right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

SCALE = 2.0  # of every contender: alpha is twice the rank


def reference_gradients(base: nn.Module, values: Mapping[str, Mapping[str, Tensor]], batch: Any) -> dict[str, Tensor]:
    """Gradients of all adapters in float64, by autograd through the formula itself, ``W + s·B A``.

    With magnitudes ``m`` the weight is ``m · (W + s·B A) / ‖W + s·B A‖`` row by row, the norm held constant (DoRA,
    arXiv 2402.09353, section 4.3). Transformers' normalisation layers compute in float32 whatever they are given, so
    the reference is good to about 1e-6.

    Args:
        base: The model without adapters.
        values: ``A``, ``B`` and perhaps ``m`` by the layer's name.
        batch: What the contender was given.

    Returns:
        As `Contender.gradients`.
    """
    exact = copy.deepcopy(base).double().eval()
    leaves = {
        f"{name}/{part}": value.detach().double().requires_grad_()
        for name, parts in values.items()
        for part, value in parts.items()
    }
    weights = {}
    for name, parts in values.items():
        weight = exact.get_submodule(name).weight + SCALE * leaves[f"{name}/B"] @ leaves[f"{name}/A"]
        if "m" in parts:
            weight = (leaves[f"{name}/m"].flatten() / weight.norm(dim=1).detach())[:, None] * weight
        weights[f"{name}.weight"] = weight
    if isinstance(batch, dict):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = functional_call(exact, weights, kwargs={**inputs, "use_cache": False}).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    else:
        loss = functional_call(exact, weights, ([x.double() for x in batch],))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest distance of a gradient from its reference, relative to the reference's norm.

    Raises:
        RuntimeError: The two do not have the same gradients.
    """
    if got.keys() != wanted.keys():
        odd = sorted(got.keys() ^ wanted.keys())
        raise RuntimeError(f"gradients on one side only: {', '.join(odd[:4])} ({len(odd)} in all)")
    return max(
        float((got[name].double().flatten() - value.flatten()).norm() / value.norm()) for name, value in wanted.items()
    )
