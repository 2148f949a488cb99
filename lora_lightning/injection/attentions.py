"""``nn.MultiheadAttention`` as a target: one layer with two projections, which reads weights and calls no layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from lora_lightning.config import ALL_LINEAR, LoraConfig
from lora_lightning.injection.matching import matches
from lora_lightning.layers import why_not


def with_projections(names: list[str], modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """Names of targets, with the out-projection behind each attention that is one, as in PEFT.

    ``exclude_modules`` can leave it out. ``"all-linear"`` means no attention, and so none of its parts.
    """
    attentions = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    if not attentions:
        return names
    if config.target_modules == ALL_LINEAR:
        skipped = [name for name in names if name.rpartition(".")[0] in attentions]
        if skipped:
            _warn(
                f"not adapted: {some(skipped)} inside nn.MultiheadAttention, which is a layer in itself. To adapt it "
                "with both of its projections, name it in target_modules"
            )
        return [name for name in names if name not in skipped]
    excluded = config.exclude_modules if isinstance(config.exclude_modules, str) else set(config.exclude_modules or ())
    found = []
    for name in names:
        found.append(name)
        out_proj = f"{name}.out_proj".removeprefix(".")
        if name in attentions and not (excluded and matches(excluded, out_proj)):
            found.append(out_proj)
    through = [name for name in found if name in attentions or name.rpartition(".")[0] in attentions]
    if config.lora_dropout and through:
        _warn(
            f"lora_dropout={config.lora_dropout:g} has no effect in {some(through)}: nn.MultiheadAttention is adapted "
            "through its weights, and nothing is dropped on the way to A (nor is it in PEFT)"
        )
    return found


def meant_by(name: str, adapted: Mapping[str, nn.Module]) -> str:
    """The name by which patterns of rank and alpha know a layer: its own, or of the attention that it is a part of."""
    parent = name.rpartition(".")[0]
    return parent if parent != name and isinstance(adapted.get(parent), nn.MultiheadAttention) else name


def attention_hindrance(name: str, modules: Mapping[str, nn.Module], config: LoraConfig) -> str | None:
    """Why the attention around a layer could not be made to read it; None where it can, and where there is none."""
    parent = modules.get(name.rpartition(".")[0])
    if parent is modules[name] or not isinstance(parent, nn.MultiheadAttention):
        return None
    above = name.rpartition(".")[0]
    own = [f"{above}.{local}" for local, weight in parent._parameters.items() if weight is not None]
    adapted = [entry for entry in config.target_parameters or [] if any(matches([entry], each) for each in own)]
    if adapted:
        return (
            f"target_parameters names {adapted[0]!r} of the attention around it, which is adapted as a whole: leave "
            f"that out, and name {above} in target_modules to adapt both of its projections"
        )
    why = "alora_invocation_tokens would need one a token" if config.alora_invocation_tokens else why_not(parent)
    return why and f"the attention around it reads its weight, and cannot be changed to read another: {why}"


def some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=7)  # of inject_lora's caller
