"""An embedding and a head that share one weight: adapted or trained together, or parted as PEFT parts them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.tokens import input_name, tied_to
from lora_lightning.layers import LoraLayer, why_not


def tie(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    chosen: dict[str, nn.Module],
    in_full: dict[str, nn.Module],
    problems: list[str],
) -> dict[str, str]:
    """Bring what is adapted or trained in full in line with the model's tied weights.

    With ``ensure_weight_tying`` the embedding is what is adapted, or trained in full, whichever of the tied layers the
    config names, and the others follow it. Without, each goes its own way, which is told.

    Args:
        root: The model.
        modules: All modules by canonical name.
        config: The config.
        chosen: Layers to adapt by name; changed here.
        in_full: Modules to train in full by name; changed here.
        problems: Gets a line for each thing that cannot be done.

    Returns:
        The layers that follow the embedding, each with the embedding's name.
    """
    source = input_name(root, modules)
    tied = tied_to(root, modules, source) if source is not None else []
    if source is None or not tied:
        if config.ensure_weight_tying and not config.trainable_token_indices:
            warnings.warn("ensure_weight_tying has no effect: no layer is tied to the input embedding", stacklevel=6)
        return {}
    named = next((group for group in (in_full, chosen) if any(name in group for name in (source, *tied))), None)
    if named is None:
        if config.ensure_weight_tying and not config.trainable_token_indices:
            warnings.warn(
                f"ensure_weight_tying has no effect: neither {source} nor {', '.join(tied)} is in target_modules or "
                "modules_to_save",
                stacklevel=6,
            )
        return {}
    if not config.ensure_weight_tying:
        _tell_parting(source, tied, named)
        return {}
    if named is chosen and config.use_dora:
        problems.append("ensure_weight_tying does not go with use_dora: a magnitude belongs to one of the two layers")
    if named is chosen:
        reasons = {name: why_not(modules[name]) for name in (source, *tied) if not isinstance(modules[name], LoraLayer)}
        problems += [f"{name} cannot be adapted: {reason}" for name, reason in reasons.items() if reason]
    odd = [name for name in tied if not isinstance(modules[name], nn.Linear)]
    if named is chosen and (odd or not isinstance(modules[source], nn.Embedding)):
        problems.append(
            "ensure_weight_tying is for an embedding and linear layers that are tied to it; "
            f"{', '.join(odd) or source} is a {type(modules[odd[0] if odd else source]).__name__}"
        )
    for group in (chosen, in_full):
        for name in (source, *tied):
            group.pop(name, None)
    named[source] = modules[source]
    return dict.fromkeys(tied, source)


def _tell_parting(source: str, tied: list[str], named: dict[str, nn.Module]) -> None:
    ends = [source, *tied]
    warnings.warn(
        f"{' and '.join(ends)} are tied, and {', '.join(name for name in ends if name in named)} changes by itself, so "
        "that they part; ensure_weight_tying=True keeps them together",
        stacklevel=6,
    )


@dataclass
class Untied:
    """A parameter that a module had in common with another, before it got one of its own."""

    module: nn.Module
    local: str
    other: nn.Module
    other_local: str

    def tie_again(self) -> None:
        """Let the module have the other's parameter."""
        self.module._parameters[self.local] = self.other._parameters[self.other_local]


def untie(model: nn.Module, in_full: Mapping[str, nn.Module], followers: Collection[nn.Module]) -> list[Untied]:
    """Give each module that trains in full parameters of its own where it shares them with others.

    Those would train along else, and where the adapter is loaded by PEFT they would not have.

    Args:
        model: All of the model.
        in_full: Modules that train in full.
        followers: Modules that are to share what they share.
    """
    if not in_full:
        return []
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in canonical_modules(model):
        for local, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, local))
    found: list[Untied] = []
    for whole in in_full.values():
        parts = list(whole.modules())
        inside = {id(part) for part in (*parts, *followers)}
        own: dict[int, nn.Parameter] = {}
        for part in parts:
            for local, parameter in list(part._parameters.items()):
                others = [owner for owner in owners.get(id(parameter), ()) if id(owner[0]) not in inside]
                if parameter is None or not others:
                    continue
                if id(parameter) not in own:
                    copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    own[id(parameter)] = copy
                found.append(Untied(part, local, *others[0]))
                part._parameters[local] = own[id(parameter)]
    return found
