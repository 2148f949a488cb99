"""Train mode for what trains: a pretrained model comes in eval mode."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lora_lightning.injection.state import lora_layers, trained_in_full


def wake(target: nn.Module) -> None:
    """Put adapted layers, and those that train in full, into train mode; say so where dropout hangs on it."""
    layers = [layer for _, layer in lora_layers(target)]
    asleep = 0
    for layer in layers:
        if layer.lora_drops:  # else its mode is about other things than the adapter, as an attention's own dropout
            asleep += not layer.training
            layer.training = True
    for _, module, originals in trained_in_full(target):
        if list(originals) != ["bias"]:  # of a layer whose bias alone trains, the rest stays as it was
            module.training = True
    if asleep and any(layer.lora_dropout for layer in layers):
        rank_zero_info(f"{asleep} LoRA layers were in eval mode; put in train mode, so that lora_dropout is in force")
