"""Folding an adapter into the base weights: ``W ← W + s · B A`` (DoRA's scaled), all of it or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.folder import load_adapter
from lora_lightning.adapters.merge_report import MergedTensor, MergeReport, largest_difference, outputs_of, warn_of_bits
from lora_lightning.adapters.ties import part_ties
from lora_lightning.errors import AdapterError
from lora_lightning.injection.beside import token_rows
from lora_lightning.injection.names import unwrap
from lora_lightning.injection.state import lora_layers, refuse_disabled, the_root
from lora_lightning.injection.tensors import norms, spread_like, whole
from lora_lightning.injection.unload import remove_adapter
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.bits import bits_of


@torch.no_grad()
def merge_lora(
    model: nn.Module, *, safe: bool = True, exact: bool = False, untie: bool = False, check_on: Any = None
) -> MergeReport:
    """Fold a model's adapter into its weights, in place, and leave plain layers that give the adapted outputs.

    Each sum is made in float32 at least (in float64 for a weight of float64) and rounded once to the weight's dtype.
    Modules trained in full keep their trained values.

    Args:
        model: An injected model, or a LightningModule around one.
        safe: Keep a copy of every weight in host memory until all are merged, so that whatever goes wrong meanwhile
            leaves the model as it was, to the bit. False takes the memory of one layer, for a model that is thrown away
            if something fails.
        exact: Make every sum in float64.
        untie: Where an adapted layer shares its weight with a module that must not change with it (a head tied to the
            embedding), give it a weight of its own, and set ``tie_word_embeddings`` of the model's config to False; the
            model grows by that weight. Else such a model is refused.
        check_on: A batch (a tensor, or a tuple or mapping of arguments) for which the model's outputs before and after
            are compared, in eval mode.

    Returns:
        How far each weight has moved, what rounding has taken of it, and the largest difference of the outputs.

    Raises:
        AdapterError: If there is no adapter, a weight is tied, or a sum is not finite. Nothing is changed then, unless
            ``safe`` is false.
    """
    model = unwrap(model)
    root = the_root(model)[1]
    refuse_disabled(model)
    layers: dict[str, Any] = {**dict(lora_layers(model)), **dict(token_rows(model))}
    if whys := [f"{name} {why}" for name, layer in layers.items() if (why := layer.lora_unmergeable()) is not None]:
        raise AdapterError("not merged:" + "".join(f"\n  - {why}" for why in whys[:4]))
    before = None if check_on is None else outputs_of(model, check_on)
    rows: list[MergedTensor] = []
    bad: list[str] = []
    with contextlib.ExitStack() as undo:  # left by an error, it puts everything back
        ties = part_ties(model, root, layers, undo, untie=untie)
        for name, layer in layers.items():
            for fold in layer.lora_folds:
                if (id(layer), fold) in ties.once:
                    continue
                value, rounded_to = _merged(layer, fold, exact=exact)
                if not _finite(value.to(rounded_to)):
                    bad.append(name)
                    continue
                if safe:
                    undo.callback(layer.lora_keep(fold))
                rows.append(_write(layer, fold, value, f"{name}.{fold}" if name else fold))
        if bad:
            raise AdapterError(f"not merged, the result would not be finite in {', '.join(bad[:4])}")
        remove_adapter(model)
        undo.pop_all()
    for own, shared in ties.copies:  # the base knew them by one name
        trains = own.requires_grad or shared.requires_grad
        own.requires_grad_(trains), shared.requires_grad_(trains)
    few = {f"{name}.weight".lstrip(".") for name, layer in layers.items() if bits_of(layer) is not None}
    warn_of_bits([row for row in rows if row.name in few])
    difference = None if before is None else largest_difference(before, outputs_of(model, check_on))
    return MergeReport(tuple(rows), difference, ties.names)


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


def _merged(layer: LoraLayer, fold: str, *, exact: bool = False) -> tuple[Tensor, torch.dtype]:
    """What a tensor of the base becomes, before it is rounded, and the dtype to which it will be."""
    base = layer.lora_base_value(fold).detach()
    kept = base.dtype
    dtype = torch.float64 if exact else torch.promote_types(base.dtype, torch.float32)
    with _in_precision(layer, dtype):
        delta = spread_like(layer.lora_delta_of(fold), base)
        base = base.to(dtype)
        return (layer.lora_merged(base, delta) if fold == "weight" else base + delta), kept


@contextlib.contextmanager
def _in_precision(layer: LoraLayer, dtype: torch.dtype) -> Iterator[None]:
    """The adapter's own parameters in another dtype."""
    own = [(parameter, parameter.data) for parameter in layer.lora_own.values()]
    try:
        for parameter, values in own:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in own:
            parameter.data = values


def _write(layer: LoraLayer, fold: str, value: Tensor, name: str) -> MergedTensor:
    """Give the base a value, and measure what has come of it."""
    base = layer.lora_base_value(fold).detach().to(value.dtype)
    size, change = norms([base, value - base]).tolist()
    del base
    layer.lora_write(fold, value)
    lost = norms([layer.lora_base_value(fold).detach().to(value.dtype) - value]).item()
    return MergedTensor(name, change / size if size else change, lost / change if change else 0.0)


def _finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite: for a ``DTensor`` every process gets one answer, and none merges alone."""
    return bool(whole(torch.isfinite(tensor).all()))
