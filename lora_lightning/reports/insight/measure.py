"""Looking at the layers of a model that trains: their updates' spectra, sizes and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.spectrum import Factors, Spectrum, factor_tensors, factors_of, spectra
from lora_lightning.injection.names import canonical_modules, is_below, join
from lora_lightning.injection.starts.residual import weight_before
from lora_lightning.injection.state import injected_roots, lora_layers, trained_in_full
from lora_lightning.injection.targets import output_embeddings
from lora_lightning.injection.tensors import norms
from lora_lightning.layers import LoraLayer, is_linear, kind_of
from lora_lightning.reports.insight.rows import InsightRow
from lora_lightning.strategies.gathering import whole_together

Layers = dict[str, LoraLayer]


def watched_layers(model: nn.Module) -> Layers:
    """Adapted layers that have parameters of their own (a tied head has an embedding's), by canonical name."""
    return {name: layer for name, layer in lora_layers(model) if layer.lora_own}


def is_spread(layers: Layers) -> bool:
    """Whether it takes all processes to look at the layers."""
    return any(isinstance(tensor, DTensor) for layer in layers.values() for tensor in layer.lora_own.values())


def names_below(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Names as a config means them, below the adapted root; where there are several roots, the whole names."""
    roots, layers = list(injected_roots(model)), dict(lora_layers(model))
    only = f"{roots[0]}." if len(roots) == 1 and roots[0] else ""
    return {name: (layers[name].lora_meant(name) if name in layers else name).removeprefix(only) for name in names}


@torch.no_grad()
def gathered(layers: Layers) -> dict[str, dict[str, Tensor]]:
    """The factors of each layer's update, by canonical name and part; where they are spread, all processes call it."""
    there = {(name, part): t for name, layer in layers.items() for part, t in factor_tensors(layer).items()}
    whole = whole_together([tensor.detach() for tensor in there.values()])
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (name, part), tensor in zip(there, whole, strict=True):
        found[name][part] = tensor
    return found


@torch.no_grad()
def measured(
    layers: Layers,
    factors: Mapping[str, Mapping[str, Tensor]],
    step: int,
    base_norms: Mapping[str, float | None],
    gradients: Mapping[str, float],
) -> list[InsightRow]:
    """A row for each layer.

    Args:
        layers: By canonical name.
        factors: From :func:`gathered`. Where an engine has left them empty, or they are no numbers, the row says
            nothing of the update.
        step: Optimizer steps done.
        base_norms: ``‖W‖`` by layer, from :func:`base_norms`.
        gradients: Norms by the names of the parameters, as far as there are any.
    """
    updates: dict[str, Factors] = {
        name: factors_of(layers[name], tensors)
        for name, tensors in factors.items()
        if all(tensor.numel() and bool(tensor.isfinite().all()) for tensor in tensors.values())
    }
    found = spectra(updates)
    return [
        InsightRow(
            step=step,
            layer=name,
            r=layer.lora_r,
            grad_norm_A=gradients.get(f"{name}.lora_A"),
            grad_norm_B=gradients.get(f"{name}.lora_B"),
            parameters=_size(layer),
            **(_columns(found[name], base_norms.get(name)) if name in found else {}),
        )
        for name, layer in layers.items()
    ]


def _columns(spectrum: Spectrum, base: float | None) -> dict[str, Any]:
    return {
        "rank": spectrum.rank,
        "effective_rank": spectrum.effective_rank,
        "stable_rank": spectrum.stable_rank,
        "rank_used": spectrum.rank_used,
        "rank_95": spectrum.used_95,
        "lesser_half": spectrum.lesser_half,
        "relative_norm": spectrum.norm / base if base else None,
    }


@torch.no_grad()
def base_norms(layers: Layers) -> dict[str, float | None]:
    """``‖W‖`` of each layer's base weight; None where an engine has flattened it. All processes have to call it."""
    found: dict[str, float | None] = {}
    for name, layer in layers.items():
        weight = _base_weight(layer)
        found[name] = None if weight is None else float(norms([weight]))
    return found


def _base_weight(layer: LoraLayer) -> Tensor | None:
    """The weight that the update is told against; None where an engine has left nothing of it in the layer."""
    weight = weight_before(layer)
    if weight is None:
        try:
            weight = layer.lora_base_value(layer.lora_folds[0]).detach()
        except AttributeError:  # FSDP's way without use_orig_params
            return None
    if isinstance(weight, DTensor):
        return weight
    is_there = weight.ndim > 1 and weight.numel() > 0 and not weight.is_meta and weight.untyped_storage().nbytes() > 0
    return weight.float() if is_there else None


@torch.no_grad()
def gradient_norms(layers: Layers) -> tuple[list[str], Tensor] | None:
    """Names of parameters and the norms of their gradients, ``(n,)`` on their device; None where there are none."""
    there = {
        f"{name}.{part}": parameter.grad
        for name, layer in layers.items()
        for part, parameter in layer.lora_own.items()
        if part in ("lora_A", "lora_B") and parameter.grad is not None
    }
    return (list(there), norms(list(there.values()))) if there else None


def left_out(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Linear layers below an adapted root that have no adapter, do not train in full and are not the output head.

    Yields:
        Canonical name, and the number of parameters of the weight.
    """
    full = [name for name, _, _ in trained_in_full(model)]
    for prefix, root in injected_roots(model).items():
        head = output_embeddings(root)
        attentions = [name for name, module in canonical_modules(root) if isinstance(module, nn.MultiheadAttention)]
        for name, module in canonical_modules(root):
            whole_name = join(prefix, name)
            if isinstance(module, LoraLayer) or module is head or not is_linear(module):
                continue
            if any(is_below(whole_name, each) for each in full) or any(is_below(name, each) for each in attentions):
                continue
            yield whole_name, _size(module)


def _size(layer: nn.Module) -> int:
    """Of the base's weight, from the layer's sizes: an engine may have taken the weight itself."""
    kind = kind_of(layer)
    if isinstance(layer, LoraLayer) and layer.lora_kind == "Conv":
        return layer.weight.numel()
    n_in, n_out = kind.lora_sides(layer)  # type: ignore[union-attr]  # there is one for every layer that comes here
    return n_in * n_out * getattr(layer, "lora_experts", 1)
