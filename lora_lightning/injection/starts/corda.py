"""CorDA: the weight is decomposed as it meets its inputs: ``W C = U S Vᵀ`` with ``C`` the covariance of the inputs.

``s · B A = U_r S_r V_rᵀ C⁻¹`` with the largest singular values (``ipm``: the directions of the task's data, to be
learned fast) or the smallest (``kpm``: away from what the data show, which is to be kept). Source: CorDA, arXiv
2406.05223; inputs are scaled, and the covariance damped, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.starts.decompositions import Start
from lora_lightning.injection.starts.inputs import leaders_of, scored, watched

_DAMP = 0.01
_GOOD_INVERSE = 0.05
_DOUBLINGS = 20


def covariances(
    layers: Mapping[str, nn.Module],
    settings: Mapping[str, Any],
    batches: Iterable[Any],
    forward: Callable[[Any], object],
) -> dict[str, Tensor]:
    """The mean of ``xᵀ x`` over batches for the inputs of each layer, ``(in, in)``; layers of one input share it.

    Args:
        layers: Layers by name.
        settings: ``use_float16_for_covariance``.
        batches: Batches, whose padding is left out.
        forward: Runs the model on a batch.

    Raises:
        LoraConfigError: If there is no batch, or an input is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    leader: dict[str, str] = {}
    dtype = torch.float16 if settings["use_float16_for_covariance"] else torch.float32
    for batch in batches:
        leader = leader or leaders_of(layers, lambda: forward(batch))  # noqa: B023  # run at once

        def take(name: str, x: Tensor) -> None:
            rows = scored(x, batch, None).to(dtype)  # noqa: B023  # as above
            if not len(rows):
                return
            rows = rows / rows.max().abs()
            product = rows.t() @ rows
            if not bool(torch.isfinite(product).all()):
                raise LoraConfigError(f"init_lora_weights='corda': an input of {name} is not finite, or too large")
            sums[name] = sums.get(name, 0) + product
            counts[name] = counts.get(name, 0) + 1

        with watched({name: layers[name] for name in layers if leader[name] == name}, take):
            forward(batch)
    if not counts:
        raise LoraConfigError("init_lora_weights='corda' looks at data, and there is no batch")
    if idle := [name for name in layers if leader[name] not in sums]:
        raise LoraConfigError(
            f"init_lora_weights='corda': {idle[0]} was not called on any batch: leave it out with exclude_modules"
        )
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: means[leader[name]] for name in layers}


def corda(weight: Tensor, covariance: Tensor, r: int, scaling: float, method: str) -> Start:
    """``A (r, in)`` and ``B (out, r)``.

    Args:
        weight: ``(out, in)``.
        covariance: ``(in, in)`` of the layer's inputs.
        r: Rank.
        scaling: The scale ``s``.
        method: ``"ipm"`` or ``"kpm"``.
    """
    damped, inverse = _inverted(covariance.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    root = (s[chosen] / scaling).sqrt()
    return root[:, None] * (vh @ inverse)[chosen], u[:, chosen] * root


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance with as much added to its diagonal as its inverse needs to be one, and that inverse."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doubled in range(_DOUBLINGS):
        damped = covariance + eye * (covariance.diagonal().mean() * _DAMP * 2**doubled)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < _GOOD_INVERSE:
            return damped, inverse
    raise LoraConfigError("init_lora_weights='corda': the covariance of a layer's inputs has no inverse; more batches")
