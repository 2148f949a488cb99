"""LoRA-GA: ``A`` and ``B`` begin with singular vectors of the gradient of the base's weight, taken out of the base.

The first step then moves ``s · B A`` much as a step of full fine-tuning would move the weight. Source: LoRA-GA, arXiv
2407.05000; options as in PEFT, which puts the singular values into ``B`` where the paper has none.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.starts.decompositions import Start, seed_from, svd_lowrank

_ITERATIONS = 4


def gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight over batches, in its shape and float32, in host memory.

    Each is taken to the host and let go as soon as backward has made it, so that the device never holds them all.

    Args:
        model: All that the loss may reach; its other parameters have no gradient meanwhile.
        layers: Layers by name.
        batches: Batches.
        loss: Gives the loss of a batch.

    Raises:
        LoraConfigError: If there is no batch, or a loss or gradient is not finite.
    """
    found: dict[str, Tensor] = {}

    def take(name: str, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        found[name] = found.get(name, 0) + gradient.detach().to("cpu", torch.float32)
        weight.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_, True)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            undo.callback(weight.requires_grad_, False)
            undo.callback(weight.register_post_accumulate_grad_hook(functools.partial(take, name)).remove)
        count = 0
        for batch in batches:
            value = loss(batch)
            if not bool(torch.isfinite(value)):
                raise LoraConfigError(f"init_lora_weights='lora_ga': the loss of batch {count} is {value.item()}")
            value.backward()
            count += 1
    if not count:
        raise LoraConfigError("init_lora_weights='lora_ga' looks at data, and there is no batch")
    if idle := [name for name in layers if name not in found]:
        warnings.warn(
            f"LoRA-GA: {len(idle)} layers took no part in the loss (first: {idle[0]}) and begin as by default",
            stacklevel=2,
        )
    if bad := [name for name, gradient in found.items() if not bool(torch.isfinite(gradient).all())]:
        raise LoraConfigError(f"init_lora_weights='lora_ga': the gradient of {bad[0]} is not finite")
    return {name: gradient / count for name, gradient in found.items()}


def lora_ga(
    gradient: Tensor, weight: Tensor, r: int, scaling: float, settings: Mapping[str, Any], generator: Generator
) -> Start:
    """``A (r, in)`` and ``B (out, r)`` from the first ``2r`` singular vectors of a gradient.

    Args:
        gradient: ``(out, in)``.
        weight: ``(out, in)``.
        r: Rank; ``2r`` is at most the smaller side.
        scaling: The scale ``s``.
        settings: ``direction`` (which vectors each gets), ``scale`` and ``stable_gamma``.
        generator: For draws.
    """
    u, s, vh = svd_lowrank(gradient, min(4 * r, *gradient.shape), _ITERATIONS, seed_from(generator))
    for_a, for_b = _directions(settings["direction"], r, generator)
    a, b = vh[for_a], u[:, for_b] * s[for_b]
    if settings["scale"] == "stable":
        b = b * (len(weight) ** 0.25 / settings["stable_gamma"] ** 0.5)
    elif settings["scale"] == "weight_svd":
        _, largest, _ = svd_lowrank(weight, r, _ITERATIONS, seed_from(generator))
        first = s[for_b][0]
        b = b * (largest[0] / first) if first > 0 else b
    elif settings["scale"] == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b


def _directions(how: str, r: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The numbers of the singular vectors that ``A`` gets, and those that ``B`` gets."""
    first, second, both = torch.arange(r), torch.arange(r, 2 * r), torch.arange(2 * r)
    if how == "random":
        drawn = torch.randperm(2 * r, generator=generator)[:r]
        return drawn, drawn
    return {"ArBr": (both[1::2], both[0::2]), "A2rBr": (second, first), "ArB2r": (first, second)}[how]
