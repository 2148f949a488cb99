"""The way back: the base model for a while, or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import AdapterError
from lora_lightning.injection.activation import deactivate
from lora_lightning.injection.beside import remove_beside, token_rows
from lora_lightning.injection.fast_paths import take_fast_paths
from lora_lightning.injection.names import canonical
from lora_lightning.injection.replicate import as_before
from lora_lightning.injection.starts.residual import bases_as_before, forget_start, put_back, weight_before
from lora_lightning.injection.state import (
    ORIGINALS,
    RECORD,
    injected_roots,
    lora_layers,
    record_of,
    refuse_disabled,
    swap,
    the_root,
    trained_in_full,
)
from lora_lightning.injection.together import compute_apart
from lora_lightning.layers import plain_class, restore
from lora_lightning.layers.bits import leave_order


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """The base model's outputs inside the ``with`` block; adapters and modules trained in full as before after it.

    Useful as a reference model without a second copy. Nothing may be trained inside the block.

    Args:
        model: An injected model, or a LightningModule around one.

    Raises:
        AdapterError: If the model has no adapter.
    """
    if not injected_roots(model):
        the_root(model)  # raises, with what to do
    adapted = [layer for _, layer in lora_layers(model)]
    layers: list[Any] = [layer for layer in (*adapted, *(rows for _, rows in token_rows(model))) if layer.lora_enabled]
    trained = [
        (module, local, swap(module, local, value.clone() if local in module._buffers else value))  # which may move
        for _, module, originals in trained_in_full(model)
        for local, value in originals.items()
    ]
    for layer in layers:
        layer.lora_enabled = False
    try:
        with bases_as_before(adapted), contextlib.ExitStack() as stacks:
            for root in injected_roots(model).values():
                stacks.enter_context(as_before(record_of(root).replicated))
            yield
    finally:
        for layer in layers:
            layer.lora_enabled = True
        for module, local, value in reversed(trained):
            swap(module, local, value)


def unload_lora(model: nn.Module) -> None:
    """Take the adapter off: the base model again, bit for bit, its parameters trainable as they were.

    Modules trained in full, and running statistics, get the values back that they had at injection.

    Args:
        model: An injected model, or a LightningModule around one.

    Raises:
        AdapterError: If the model has no adapter, it is switched off (:func:`lora_disabled`), or a layer's class was
            changed since; nothing is changed then.
    """
    if not injected_roots(model):
        the_root(model)  # raises, with what to do
    refuse_disabled(model)
    trained = [(module, originals) for _, module, originals in trained_in_full(model)]
    moved = [
        (value, record_of(root).statistics[name])
        for root in injected_roots(model).values()
        for name, value in ((canonical(key), buffer) for key, buffer in root.named_buffers())
        if name in record_of(root).statistics
    ]
    changed = [(layer, before) for _, layer in lora_layers(model) if (before := weight_before(layer)) is not None]
    records = [record_of(root) for root in injected_roots(model).values()]
    remove_adapter(model)
    with torch.no_grad():
        for layer, weight in changed:
            put_back(layer, weight)
        for value, before in moved:
            value.copy_(before)
        for module, originals in trained:
            for local, value in originals.items():
                getattr(module, local).copy_(value)
    for record in records:
        for parameter in record.untied:
            parameter.tie_again()
        if record.replicated is not None:
            record.replicated.show(0)


def remove_adapter(model: nn.Module) -> None:
    """Make adapted layers plain and clear every trace; values of base parameters stay as they are now.

    Raises:
        AdapterError: If a layer's class was changed since injection; nothing is changed then.
    """
    layers = dict(lora_layers(model))
    for name, layer in (*layers.items(), *token_rows(model)):
        if plain_class(vars(layer).get("lora_holder", layer)) is None:
            raise AdapterError(
                f"{name} cannot be made plain again: its class is {type(layer).__name__} now, which is not one that "
                "injection gave it (fully_shard changes classes too). Take off what changed it first, or load the "
                "saved adapter into a fresh model"
            )
    for layer in layers.values():
        forget_start(layer)
        restore(layer)
    remove_beside(model)
    deactivate(model)
    compute_apart(model)
    take_fast_paths(model)
    leave_order(model)
    for module in model.modules():
        vars(module).pop(ORIGINALS, None)
    for root in injected_roots(model).values():
        trainable = set(record_of(root).trainable_before)
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(name in trainable)
        del vars(root)[RECORD]
