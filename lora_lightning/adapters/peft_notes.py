"""Where PEFT computes something else than the layers here from the same file: told when it was PEFT that wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from lora_lightning.injection.state import lora_layers
from lora_lightning.layers.attention import LoraOverAttention
from lora_lightning.layers.conv import LoraOverConv
from lora_lightning.layers.dora import DoraLayer

_TWICE = (
    "PEFT (0.21) applies the update of an nn.MultiheadAttention's out_proj twice, and here it is applied once. For "
    "PEFT's outputs, double it after loading: layer.lora_B.data.mul_(2)"
)
_NEVER = (
    "PEFT never applies an adapter that names the out_proj of an nn.MultiheadAttention alone, and here it is applied. "
    "For PEFT's outputs, load it without"
)
_PADDED = (
    "PEFT (0.21) gives a convolution's lora_A neither the dilation nor the padding_mode of its layer, and here it has "
    "both, so that outputs are not those that PEFT gave"
)
_NORMS = (
    "PEFT (0.21) takes DoRA's norms of a convolution in groups over other weights than the layer's own, and here they "
    "are those of W + s B A, so that outputs are not those that PEFT gave"
)


def warn_of_peft(root: nn.Module, source: str) -> None:
    """Warn of the layers whose outputs are not those that PEFT gives with the same file."""
    layers: dict[str, list[str]] = {}
    for name, note in _notes(root):
        layers.setdefault(note, []).append(name)
    for note, names in layers.items():
        more = f" and {len(names) - 3} more" if names[3:] else ""
        warnings.warn(f"{source}: {note}. Layers: {', '.join(names[:3])}{more}", stacklevel=4)


def _notes(root: nn.Module) -> Iterator[tuple[str, str]]:
    adapted = dict(lora_layers(root))
    for name, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in adapted.values():
            yield f"{name}.out_proj".removeprefix("."), _TWICE if isinstance(module, LoraOverAttention) else _NEVER
    for name, layer in adapted.items():
        if not isinstance(layer, LoraOverConv):
            continue
        conv: nn.Module = layer
        if conv.padding_mode != "zeros" or any(step != 1 for step in conv.dilation):  # type: ignore[union-attr]
            yield name, _PADDED
        if isinstance(layer, DoraLayer) and layer.groups > 1:
            yield name, _NORMS
