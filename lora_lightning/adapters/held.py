"""One adapter apart from its model: taken out of the layers with all that it is, and put in again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from re import escape

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.facts import adapter_state
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.peft_config import int_if_whole
from lora_lightning.adapters.peft_names import peft_names
from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import changes_base
from lora_lightning.errors import AdapterError
from lora_lightning.injection import freeze_base, unload_lora
from lora_lightning.injection.inject import inject_unfilled
from lora_lightning.injection.matching import matches
from lora_lightning.injection.names import canonical_modules, join
from lora_lightning.injection.state import (
    Injected,
    load_lora_state,
    lora_layers,
    lora_state_dict,
    record_of,
    the_root,
)

_ORIGIN = ("seed", "bases", "source", "awaits_data", "asked")
"""What a record says of an adapter; the rest of it is about the model that the adapter is in."""
_MORE = (
    *("target_parameters", "trainable_token_indices", "ensure_weight_tying", "layer_replication"),
    "alora_invocation_tokens",
)


@dataclass(eq=False)
class Held:
    """An adapter by itself. Names are canonical, below the model that it was taken from.

    Attributes:
        record: What injection noted, its config among it.
        prefix: Name of the root, which the names in the config and in files are relative to.
        layers: Rank and scale of each adapted layer.
        low: The low-rank parameters, the very ones that the layers have while the adapter is in them.
        full: Values of what trains in full, and of running statistics that have moved; they live in the base's own
            parameters while the adapter is in.
        keys: Name in a file for each of ``low`` and ``full``.
        base: Fingerprint of the base.
    """

    record: Injected
    prefix: str
    layers: dict[str, tuple[int, float]]
    low: dict[str, nn.Parameter]
    full: dict[str, Tensor]
    keys: dict[str, str]
    base: str | None

    @property
    def config(self) -> LoraConfig:
        """What was injected."""
        return self.record.config

    def more_than_layers(self) -> str | None:
        """Which settings make it more than updates of single layers over the base as it is; None where none does."""
        found = [f"{field}={value!r}" for field in _MORE if (value := getattr(self.config, field))]
        if changes_base(start := self.config.init_lora_weights):
            loaded = "once saved and loaded again, it is for the base as it is"
            found.append(f"init_lora_weights={start!r} ({'for a rounded base' if start == 'loftq' else loaded})")
        return ", ".join(found) or None

    def by_layer(self) -> dict[str, dict[str, nn.Parameter]]:
        """The low-rank parameters by layer, in the order of the model."""
        found: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.layers}
        for name, parameter in self.low.items():
            layer, _, part = name.rpartition(".")
            found[layer][part] = parameter
        return found

    def below_root(self, name: str) -> str:
        """A name as the config has it."""
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name


def held_in(model: nn.Module) -> Held:
    """The adapter that is in a model, as it stands; values in full are copied to the CPU.

    Raises:
        AdapterError: If there is none.
    """
    prefix, root = the_root(model)
    record = record_of(root)
    layers = dict(lora_layers(model))
    low = {join(name, part): p for name, layer in layers.items() for part, p in layer.lora_own.items()}
    full = {name: value for name, value in adapter_state(model).items() if name not in low}
    unmoved = [name for name, before in record.statistics.items() if _same(full.get(join(prefix, name)), before)]
    for name in unmoved:
        del full[join(prefix, name)]
    return Held(
        record=record,
        prefix=prefix,
        layers={name: (layer.lora_r, layer.lora_scaling) for name, layer in layers.items()},
        low=low,
        full={name: value.detach().to("cpu", copy=True) for name, value in full.items()},
        keys={join(prefix, name): key for name, key in peft_names(root).items()},
        base=fingerprint(root),
    )


def take_out(model: nn.Module, *, offload: bool = True) -> Held:
    """Take the adapter out of a model, which is its base again.

    Args:
        model: An injected model.
        offload: Move the low-rank parameters to the CPU, but those that are spread over processes.

    Returns:
        The adapter. Its parameters are those that the layers had; what moves to the CPU lets its gradient go.

    Raises:
        AdapterError: If there is none, or a layer's class was changed since; nothing is changed then.
    """
    held = held_in(model)
    unload_lora(model)
    for parameter in held.low.values():
        parameter.requires_grad_(False)
        if offload and not isinstance(parameter.data, DTensor):
            parameter.grad = None
            parameter.data = parameter.data.cpu()
    return held


@torch.no_grad()
def put_in(model: nn.Module, held: Held, *, trains: bool = False) -> None:
    """Put an adapter into a base model: its parameters into the layers, its values in full into the base's own.

    Args:
        model: The model that it was taken out of, or one just like it.
        held: The adapter.
        trains: Let it train; else all of the model is frozen.

    Raises:
        AdapterError: If the model has other layers than the adapter; it is as it was then.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the adapter came
        inject_unfilled(model, held.config)
    try:
        _fill(model, held)
    except BaseException:
        unload_lora(model)
        raise
    let_train(model, trains)


def _fill(model: nn.Module, held: Held) -> None:
    layers = dict(lora_layers(model))
    shapes = {join(name, part): p.shape for name, layer in layers.items() for part, p in layer.lora_own.items()}
    if shapes != {name: p.shape for name, p in held.low.items()}:
        other = [name for name in {**shapes, **held.low} if name not in shapes or name not in held.low]
        why = f": {', '.join(sorted(other)[:4])} would be only in one of them" if other else ", which have other shapes"
        raise AdapterError(f"the adapter does not fit the layers of this model{why}")
    for name, layer in layers.items():
        for part, empty in layer.lora_own.items():
            parameter = held.low[join(name, part)]
            parameter.data = parameter.data.to(empty.device)
            setattr(layer, part, parameter)
    load_lora_state(model, lora_state_dict(model) | held.full, "the adapter")
    fresh = record_of(the_root(model)[1])
    for field in _ORIGIN:
        setattr(fresh, field, getattr(held.record, field))
    held.record = fresh


def let_train(model: nn.Module, trains: bool) -> None:
    """Let the adapter in a model train and nothing else, or freeze all of the model."""
    model.requires_grad_(False)
    if trains:
        freeze_base(model)


def explicit(config: LoraConfig, layers: Mapping[str, tuple[int, float]], root: nn.Module) -> LoraConfig:
    """A config that names its layers, with a rank and a scale of its own for each.

    Args:
        config: Where the other settings come from.
        layers: Rank and scale by name below the root.
        root: The model, in which no other layer may be meant.
    """
    ranks, alphas = {n: r for n, (r, _) in layers.items()}, {n: s * r for n, (r, s) in layers.items()}
    r, alpha = _usual(ranks.values()), _usual(alphas.values())
    return replace(
        config,
        r=int(r),
        lora_alpha=int_if_whole(alpha),
        use_rslora=False,
        target_modules=_exactly(list(layers), root),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={f"^{escape(name)}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{escape(name)}": int_if_whole(a) for name, a in alphas.items() if a != alpha},
        init_lora_weights=True,
    )


def _exactly(names: list[str], root: nn.Module) -> list[str] | str:
    """A list of names, or an expression where the end of another module's name is one of them."""
    wanted = set(names)
    others = any(matches(wanted, name) for name, _ in canonical_modules(root) if name not in wanted)
    return "|".join(map(escape, names)) if others or "" in wanted else names


def _usual(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _same(value: Tensor | None, before: Tensor) -> bool:
    return value is not None and torch.equal(value, before.to(value.device))
