"""PEFT's names for what an adapter holds, from ours and back.

Ours are relative to the root (``layers.0.q_proj.lora_A``); PEFT's carry a prefix and say what kind of layer it is
(``base_model.model.layers.0.q_proj.lora_A.weight``). Shapes are the same for every kind of layer here.
"""

from __future__ import annotations

from torch import nn

from lora_lightning.injection.state import lora_layers, lora_state_dict

PREFIX = "base_model.model."


def peft_names(root: nn.Module) -> dict[str, str]:
    """Our name to PEFT's name, for all that :func:`lora_state_dict` gives of an injected root."""
    adapted = {name: layer.lora_kind for name, layer in lora_layers(root)}
    return {name: PREFIX + _peft_name(name, adapted) for name in lora_state_dict(root)}


def _peft_name(name: str, adapted: dict[str, str]) -> str:
    layer, _, local = name.rpartition(".")
    if layer not in adapted:
        return name  # a module trained in full, a bias of a layer that is not adapted, running statistics
    if local in ("lora_A", "lora_B"):
        if adapted[layer] == "Embedding":
            return f"{layer}.lora_embedding_{local[-1]}"
        return f"{layer}.{local}.weight"
    return f"{layer}.base_layer.{local}"


def adapted_names(root: nn.Module) -> list[str]:
    """Names of the adapted layers below a root."""
    return [name for name, _ in lora_layers(root)]


def short_targets(root: nn.Module) -> list[str]:
    """The shortest list that names exactly the adapted layers as PEFT matches a list: last parts where they suffice."""
    adapted = set(adapted_names(root))
    chosen: set[str] = set()
    by_last: dict[str, list[str]] = {}
    for name, _ in root.named_modules():
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    for name in adapted:
        last = name.rpartition(".")[2]
        exact = all(other in adapted for other in by_last.get(last, []))
        chosen.add(last if exact else name)
    return sorted(chosen)
