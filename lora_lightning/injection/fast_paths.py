"""Short cuts of torch's own transformers, which in eval read weights past the layers: off where layers are adapted."""

from __future__ import annotations

from torch import nn

from lora_lightning.injection.names import canonical_modules
from lora_lightning.layers import LoraLayer

_KEPT = "_lora_fast_path"
# What switches the short cut of a module off. An encoder's hands its layers nested tensors, which only theirs can take.
_SWITCHES: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def leave_fast_paths(root: nn.Module, adapted: type = LoraLayer) -> None:
    """Make ``nn.TransformerEncoder`` and its layers call their parts, where these are adapted (of that class)."""
    for _, module in canonical_modules(root):
        for kind, switch, off in _SWITCHES:
            if not isinstance(module, kind) or _KEPT in vars(module) or switch not in vars(module):
                continue
            if any(isinstance(part, adapted) for part in module.modules()):
                vars(module)[_KEPT] = vars(module)[switch]
                vars(module)[switch] = off


def take_fast_paths(root: nn.Module) -> None:
    """Undo :func:`leave_fast_paths`."""
    for module in root.modules():
        for kind, switch, _ in _SWITCHES:
            if isinstance(module, kind) and _KEPT in vars(module):
                vars(module)[switch] = vars(module).pop(_KEPT)
