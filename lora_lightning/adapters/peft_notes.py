"""Where PEFT computes something else than the layers here from one file: told where it goes from one to the other."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.injection.state import lora_layers
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.attention import LoraOverAttention
from lora_lightning.layers.conv import LoraOverConv
from lora_lightning.layers.dora import DoraLayer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Note:
    """What PEFT does, and what to do to have its outputs here."""

    fact: str
    remedy: str = ""


_TWICE = _Note(
    "PEFT (0.21) applies the update of an nn.MultiheadAttention's out_proj twice, and here it is applied once",
    "For PEFT's outputs, double it after loading: layer.lora_B.data.mul_(2)",
)
_NEVER = _Note(
    "PEFT never applies an adapter of the out_proj of an nn.MultiheadAttention that names it alone, and here it is "
    "applied",
    "For PEFT's outputs, do without it",
)
_PADDED = _Note(
    "PEFT (0.21) gives a convolution's lora_A neither the dilation nor the padding_mode of its layer, and here it has "
    "both"
)
_NORMS = _Note(
    "PEFT (0.21) takes DoRA's norms of a convolution in groups over other weights than the layer's, and here they are "
    "those of W + s B A"
)


def warn_of_peft(root: nn.Module, source: str, *, written_here: bool) -> None:
    """Warn of the layers whose outputs are not those that PEFT gives with the same file.

    Args:
        root: The injected root.
        source: The file or folder.
        written_here: Whether it was made here, for PEFT to read; else PEFT has made it.
    """
    layers: dict[_Note, list[str]] = {}
    for name, note in _notes(root):
        layers.setdefault(note, []).append(name)
    for note, names in layers.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        whose = "PEFT will give other outputs than these" if written_here else "outputs are not those that PEFT gave"
        remedy = "" if written_here else note.remedy
        warnings.warn(f"{source}: {note.fact}, so that {whose}. Layers: {listed}. {remedy}".rstrip(), stacklevel=4)


def attentions_in(root: nn.Module) -> list[str]:
    """Names of the attentions that are adapted as a whole."""
    return [name for name, layer in lora_layers(root) if isinstance(layer, LoraOverAttention)]


def without_unused(weights: Mapping[str, Tensor], attentions: Iterable[str], source: str) -> dict[str, Tensor]:
    """A file's tensors less those that PEFT writes and never uses.

    Where its ``target_modules`` match an attention and its ``out_proj`` both, it adapts the latter twice over, and only
    what it keeps under the attention's own name has any effect.

    Args:
        weights: Tensors by PEFT's names.
        attentions: Names, below the root, of the attentions that are adapted as a whole.
        source: The file or folder.
    """
    beginnings = tuple(f"{PREFIX}{name}.out_proj." for name in attentions)
    unused = [key for key in weights if key.startswith(beginnings)]
    if unused:
        _LOG.info("%s: passed over, never used by PEFT either: %s", source, ", ".join(sorted(unused)))
    return {key: value for key, value in weights.items() if key not in unused}


def _notes(root: nn.Module) -> Iterator[tuple[str, _Note]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, LoraLayer):
            note = _TWICE if isinstance(module, LoraOverAttention) else _NEVER
            yield f"{name}.out_proj".removeprefix("."), note
        if not isinstance(module, LoraOverConv):
            continue
        conv = cast("nn.Conv2d", module)
        if conv.padding_mode != "zeros" or any(step != 1 for step in conv.dilation):
            yield name, _PADDED
        if isinstance(module, DoraLayer) and conv.groups > 1:
            yield name, _NORMS
