"""What stands in the way of a start, told before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.config import LoraConfig
from lora_lightning.config_checks import listed
from lora_lightning.config_starts import DATA_DRIVEN, changes_base, start_of
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import canonical_modules
from lora_lightning.layers import LoraLayer, is_linear, is_quantised
from lora_lightning.layers.base import COMPUTED_IN

_OF_WEIGHTS = ("pissa", "olora", "mica", "loftq", "corda", "lora_ga")
_MOST = 6  # lines of a message


def refuse_starts(root: nn.Module, targets: Iterable[Any], config: LoraConfig) -> None:
    """See that every layer that is about to be adapted can begin as the config says.

    Args:
        root: The model that the targets are in.
        targets: Layers with their ``name``, ``layer`` and rank ``r``.
        config: What is about to be injected.

    Raises:
        LoraConfigError: With the layers that cannot, and why.
    """
    start = start_of(config.init_lora_weights)
    if start not in _OF_WEIGHTS:
        return
    changes = changes_base(start)
    owners = _owners(root) if changes else {}
    problems = []
    for target in targets:
        if isinstance(target.layer, LoraLayer):
            continue
        why = _why_not(target.layer, target.r, str(start))
        shared = [name for name in owners.get(id(target.layer.weight), ()) if name != target.name]
        if why is None and shared and is_linear(target.layer):
            why = f"its weight is also that of {', '.join(shared[:2])}, which would change with it: untie them first"
        if why is not None:
            problems.append(f"{target.name}: {why}")
    if problems:
        more = [f"{len(problems) - _MOST} more layers"] if problems[_MOST:] else []
        raise LoraConfigError(
            listed(
                f"init_lora_weights={config.init_lora_weights!r} cannot begin so (exclude_modules leaves layers out)",
                problems[:_MOST] + more,
            )
        )


def refuse_other_stack(config: LoraConfig) -> None:
    """Raise where data would be shown to the base's own stack of layers, and the adapters are on another."""
    if config.init_lora_weights in DATA_DRIVEN and config.layer_replication:
        raise LoraConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not go with layer_replication: what data show of the "
            "base is not what they would show of the stack that is built from it. Use another init_lora_weights "
            "(true, orthogonal), or save a model with that stack and adapt it without layer_replication"
        )


def _why_not(layer: nn.Module, r: int, start: str) -> str | None:
    if isinstance(layer, nn.Embedding):
        return _rank_too_large(layer.weight, r, start) if start == "mica" else None
    if not is_linear(layer):
        return f"a {type(layer).__name__} is no linear layer, and no other kind can"
    weight: Any = layer.weight
    if hasattr(weight, "ds_id"):
        return "its weight is split by DeepSpeed (ZeRO-3): build the model without zero.Init, or use ZeRO-2"
    if is_quantised(layer) or weight.dtype not in COMPUTED_IN or weight.dim() != 2:
        return (
            f"its weight is stored as {type(weight).__name__} of {weight.dtype}, {tuple(weight.shape)}: this start "
            "takes part of the weight itself, so it needs a base that is not quantised, and injection before FSDP"
        )
    if too_large := _rank_too_large(weight, r, start):
        return too_large
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        return "its weight has values that are not finite"
    return None


def _rank_too_large(weight: Tensor, r: int, start: str) -> str | None:
    """LoRA-GA gives ``A`` and ``B`` singular vectors of their own, so that it needs twice as many."""
    needed, there = (2 * r if start == "lora_ga" else r), min(weight.shape)
    if needed <= there:
        return None
    return (
        f"rank {r} needs {needed} singular vectors, and a weight of {tuple(weight.shape)} has {there}: use a smaller r"
    )


def _owners(root: nn.Module) -> dict[int, list[str]]:
    """The modules that have each parameter, by its id."""
    found: dict[int, list[str]] = {}
    for name, module in canonical_modules(root):
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(name)
    return found
