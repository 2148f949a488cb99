"""Which parameters a config names in ``target_parameters``, matched as PEFT does, and what does not go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.errors import did_you_mean
from lora_lightning.injection.matching import matches, pattern_value
from lora_lightning.layers.parameters import LoraParameter, child_name, why_not_parameter

_STARTS = (True, False, "gaussian")


@dataclass(frozen=True)
class ParameterTarget:
    """One parameter to adapt.

    Attributes:
        name: Canonical name of the child that will adapt it.
        holder: The module that has it.
        parameter: Its name there.
        r: Rank of each expert's update.
        lora_alpha: Numerator of the scale.
    """

    name: str
    holder: nn.Module
    parameter: str
    r: int
    lora_alpha: float

    @property
    def meant(self) -> str:
        """The parameter's own canonical name, as configs have it."""
        return f"{self.name.rpartition('.')[0]}.{self.parameter}"


def parameters_meant(
    modules: Mapping[str, nn.Module], config: LoraConfig, taken: Collection[int], problems: list[str]
) -> list[ParameterTarget]:
    """Find the parameters that a config names.

    Args:
        modules: All modules by canonical name.
        config: The config; ``exclude_modules`` and ``layers_to_transform`` are about modules and not asked here.
        taken: Ids of modules that are trained in full or adapted as layers.
        problems: Gets a line for each thing that cannot be done.
    """
    wanted = config.target_parameters or []
    if wanted and (foreign := _does_not_go_with(config)):
        problems.append(f"target_parameters does not go with {', '.join(foreign)}: there is no layer in which to do it")
    found: list[ParameterTarget] = []
    hits: set[str] = set()
    for prefix, module in modules.items() if wanted else ():
        if isinstance(module, LoraParameter):
            continue
        for local in module._parameters:
            name = f"{prefix}.{local}" if prefix else local
            entries = [entry for entry in wanted if matches([entry], name)]
            hits.update(entries)
            if not entries or module._parameters[local] is None:
                continue
            if reason := _hindrance(prefix, modules, local, taken):
                problems.append(f"target_parameters: {name} cannot be adapted: {reason}")
                continue
            r = int(pattern_value(config.rank_pattern, name, config.r))
            alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
            found.append(ParameterTarget(f"{prefix}.{child_name(local)}", module, local, r, alpha))
    problems += [_no_match(entry, modules) for entry in wanted if entry not in hits]
    return found


def _does_not_go_with(config: LoraConfig) -> list[str]:
    switches = ("lora_dropout", "use_dora", "lora_bias", "alora_invocation_tokens")
    foreign = [f"{name}={value!r}" for name in switches if (value := getattr(config, name))]
    if config.init_lora_weights not in _STARTS:
        foreign.append(f"init_lora_weights={config.init_lora_weights!r}")
    return foreign


def _hindrance(prefix: str, modules: Mapping[str, nn.Module], local: str, taken: Collection[int]) -> str | None:
    holder, above = modules[prefix], prefix.rpartition(".")[0]
    if not prefix:
        return "it belongs to the model itself; PEFT's files have no name for that. Put it into a module of its own"
    known = isinstance(holder._modules.get(child_name(local)), LoraParameter)
    if id(holder) in taken:
        return f"{prefix} is adapted or trained in full as a whole; name the one or the other"
    if prefix != above and isinstance(modules.get(above), nn.MultiheadAttention):
        return f"nn.MultiheadAttention reads the weight and calls no {prefix}: name {prefix} in target_modules instead"
    return None if known else why_not_parameter(holder, local)


def _no_match(entry: str, modules: Mapping[str, nn.Module]) -> str:
    names = [
        f"{prefix}.{local}"
        for prefix, module in modules.items()
        for local, parameter in module._parameters.items()
        if parameter is not None and prefix
    ]
    near = did_you_mean(entry.rpartition(".")[2], {name.rpartition(".")[2] for name in names})
    stacked = Counter(
        ".".join([prefix.rpartition(".")[2], local])
        for prefix, module in modules.items()
        for local, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and prefix
    )
    listed = ", ".join(f"{name} (×{count})" for name, count in stacked.most_common(12))
    return f"target_parameters: {entry!r} matches nothing{near}. Parameters of three dimensions: {listed or 'none'}"
