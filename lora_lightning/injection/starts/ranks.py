"""Other ranks for layers that are adapted already."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.injection.matching import matches, pattern_value
from lora_lightning.injection.starts.residual import forget_start
from lora_lightning.injection.state import ORIGINALS, lora_layers, record_of
from lora_lightning.layers import LoraLayer, restore


def with_ranks(root: nn.Module, config: LoraConfig) -> None:
    """Give adapted layers the ranks and alphas of another config, values to follow; others become plain.

    The record keeps the config that was asked for, so that asking for it again finds this adapter in place.
    """
    record = record_of(root)
    dropped = config.target_modules != record.config.target_modules
    for name, layer in lora_layers(root):
        meant = layer.lora_meant(name)
        if dropped and not matches(config.target_modules, meant):
            forget_start(layer)
            restore(layer)
            if config.bias == "lora_only":
                _bias_as_before(layer)
            continue
        r = int(pattern_value(config.rank_pattern, meant, config.r))
        alpha = pattern_value(config.alpha_pattern, meant, config.lora_alpha)
        _set_rank(layer, r, alpha, config.scaling(r, alpha))
    record.asked, record.config = record.asked or record.config, config


@torch.no_grad()
def _bias_as_before(layer: nn.Module) -> None:
    """Let the bias of a layer that is plain again be the base's, which trains with an adapter only."""
    for local, value in vars(layer).pop(ORIGINALS, {}).items():
        getattr(layer, local).copy_(value)


def _set_rank(layer: LoraLayer, r: int, alpha: float, scaling: float) -> None:
    if r != layer.lora_r:
        for name, shape in type(layer).lora_shapes(layer, r).items():
            old: nn.Parameter = getattr(layer, name)
            if old.shape != torch.Size(shape):
                setattr(layer, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    vars(layer).update(lora_r=r, lora_alpha=alpha, lora_scaling=scaling)
