"""Folding an adapter into the base weights: ``W ← W + s · B A`` (DoRA's scaled), all of it or nothing."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from lora_lightning.adapters.folder import load_adapter
from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical_modules, unwrap
from lora_lightning.injection.state import lora_layers, the_root
from lora_lightning.injection.tensors import spread_like, whole
from lora_lightning.injection.unload import remove_adapter
from lora_lightning.layers import LoraLayer


@torch.no_grad()
def merge_lora(model: nn.Module, *, safe: bool = True) -> None:
    """Fold a model's adapter into its weights, in place, and leave plain layers that give the adapted outputs.

    Each sum is made in float32 at least and rounded once to the weight's dtype. Modules trained in full keep their
    trained values. An adapted layer whose weight is tied to another module is refused: merging would change both.

    Args:
        model: An injected model, or a LightningModule around one.
        safe: Make every sum once beforehand and refuse values that are not finite; False spares that pass.

    Raises:
        AdapterError: If there is no adapter, a weight is tied, or a sum is not finite. Nothing is changed then.
    """
    model = unwrap(model)
    the_root(model)
    layers = dict(lora_layers(model))
    _refuse_tied(model, layers)
    if safe and (bad := [name for name, layer in layers.items() if not _finite(_merged(layer))]):
        raise AdapterError(f"not merged, the result would not be finite in {', '.join(bad[:4])}")
    for layer in layers.values():
        layer.weight.copy_(_merged(layer))
    remove_adapter(model)


def fold_in(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Make a saved adapter part of the base: load it, merge it, and leave the model trainable as it was.

    Raises:
        AdapterError: If the folder does not fit or cannot be merged; the model is as it was then.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    load_adapter(model, folder)
    merge_lora(model)
    for parameter in trainable:
        parameter.requires_grad_(True)


def _merged(layer: LoraLayer) -> Tensor:
    weight = layer.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    own = [(parameter, parameter.data) for parameter in layer.lora_own.values()]
    for parameter, values in own:
        parameter.data = values.to(exact)
    try:
        return layer.lora_merged(weight.to(exact), spread_like(layer.lora_weight_delta(), weight)).to(weight.dtype)
    finally:
        for parameter, values in own:
            parameter.data = values


def _finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite: for a ``DTensor`` every process gets one answer, and none merges alone."""
    return bool(whole(torch.isfinite(tensor).all()))


def _refuse_tied(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    owners: dict[int, dict[int, str]] = {}
    for name, module in canonical_modules(model):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module)] = name
    for name, layer in layers.items():
        others = [owner for module, owner in owners[id(layer.weight)].items() if module != id(layer)]
        if others:
            raise AdapterError(
                f"not merged: the weight of {name} is tied to {', '.join(others)}, which would change with it. Untie "
                "them first (give one a copy of the weight, and set tie_word_embeddings=False in the model's config)"
            )
