"""What is computed together around adapted layers: layers on one input, gated blocks, frozen norms, rotations.

Nothing is wrapped: groups are noted on the layers, and blocks change their class to a subclass of it, as the layers do.
Which ones fit is read in the source of their class. The results are those of each computed by itself.
"""

from __future__ import annotations

from collections import Counter
from types import FunctionType

from torch import nn

from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.source import called_on_one_input, is_formula
from lora_lightning.layers import DoraLinear, LoraLayer, LoraLinear, plain_class, rotary
from lora_lightning.layers.attention import LoraReadsOutProj
from lora_lightning.layers.gated import FORMULA, LoraGated, activation_of
from lora_lightning.layers.group import LoraGroup
from lora_lightning.layers.hazards import detached_hook, why_not
from lora_lightning.layers.made import made_class
from lora_lightning.layers.norm import FORMULAS, LoraNorm, LoraNormRoundingLast
from lora_lightning.layers.packed import PackedLoraLinear
from lora_lightning.layers.packed_gated import PackedGated
from lora_lightning.layers.rotary import LoraRotary


def compute_together(root: nn.Module) -> None:
    """Find, below ``root``, what can be computed together, and let it be."""
    modules = [module for _, module in canonical_modules(root)]
    parents = Counter(id(child) for module in modules for child in module._modules.values())
    for module in modules:
        if plain_class(module) is not None:
            continue  # a layer, or done already
        if module._modules:
            _group(module, parents)
        if (over := _over(module)) is not None:
            with detached_hook(module):
                module.__class__ = made_class(over, type(module))  # type: ignore[assignment]


def compute_apart(root: nn.Module) -> None:
    """Undo :func:`compute_together`; layers leave their groups when they lose their adapters."""
    for module in root.modules():
        plain = plain_class(module)
        if plain is not None and isinstance(module, _OVER_BLOCKS):
            with detached_hook(module):
                module.__class__ = plain  # type: ignore[assignment]


def _group(parent: nn.Module, parents: Counter[int]) -> None:
    if sum(_shares(child) for child in parent._modules.values()) < 2:
        return
    kind: type = type(parent)
    for names in called_on_one_input(kind):
        parts = [parent._modules.get(name) for name in names]
        if any(getattr(part, "inplace", False) for part in parts):
            continue  # an activation that writes into what the others are called on
        layers = [part for part in parts if isinstance(part, _SHARING)]
        # A layer that has another parent too may be called without the rest of its group.
        layers = [layer for layer in layers if _shares(layer) and not layer.lora_group and parents[id(layer)] == 1]
        if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
            group = LoraGroup(layers)
            for layer in layers:
                vars(layer)["lora_group"] = group


def _shares(layer: nn.Module | None) -> bool:
    """Whether a layer's forward is one that can share work; all of one model are of one variant."""
    return getattr(type(layer), "forward", None) in [kind.forward for kind in _SHARING]


_OVER_BLOCKS = (LoraGated, PackedGated, LoraNorm, LoraRotary, LoraReadsOutProj)
_SHARING = (LoraLinear, DoraLinear, PackedLoraLinear)
_GATED = {LoraLinear: LoraGated, PackedLoraLinear: PackedGated}
"""What a gated block becomes whose layers are of a kind."""


def _over(module: nn.Module) -> type[nn.Module] | None:
    """The class that may be put over a module's own, or None."""
    kind: type = type(module)
    over: type[nn.Module] | None
    if isinstance(module, nn.MultiheadAttention):
        over = LoraReadsOutProj if isinstance(module.out_proj, LoraLayer) else None
    elif not module._modules:
        over = _norm_over(module, kind)
    elif (gated := _gated_over(module, kind)) is not None:
        over = gated
    else:
        over = LoraRotary if _rotates(kind) else None
    return over if over is not None and why_not(module) is None else None


def _gated_over(module: nn.Module, kind: type) -> type[nn.Module] | None:
    if "down_proj" not in module._modules:
        return None
    parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    forwards = {getattr(type(part), "forward", None) for part in parts}
    known = activation_of(module._modules.get("act_fn")) is not None and is_formula(kind, FORMULA)
    return next((over for each, over in _GATED.items() if known and forwards == {each.forward}), None)


def _norm_over(module: nn.Module, kind: type) -> type[LoraNorm] | None:
    if list(module._parameters) == ["weight"] and hasattr(module, "variance_epsilon"):
        for formula, rounds_last in FORMULAS.items():
            if is_formula(kind, formula):
                return LoraNormRoundingLast if rounds_last else LoraNorm
    return None


def _rotates(kind: type) -> bool:
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, FunctionType) or rotary.NAME not in forward.__code__.co_names:
        return False
    rotation = forward.__globals__.get(rotary.NAME)
    half = getattr(rotation, "__globals__", {}).get("rotate_half")
    return (
        callable(rotation)
        and callable(half)
        and is_formula(rotation, rotary.FORMULA)
        and is_formula(half, rotary.HALF_FORMULA)
        and rotary.original(forward) is rotation
    )
