"""An adapter for each row of a batch: every layer that one of them has is given all of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.held import Held
from lora_lightning.errors import AdapterError
from lora_lightning.injection.fast_paths import leave_fast_paths, take_fast_paths
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.targets import resolve
from lora_lightning.layers import adapt
from lora_lightning.layers.per_row import PerRow, Rows, seat, twin_of, unseat


@contextlib.contextmanager
def per_row(model: nn.Module, held: Mapping[str, Held], names: Sequence[str], beams: int = 1) -> Iterator[Rows]:
    """Inside the ``with`` block each row of a batch is computed with the adapter named for it.

    Args:
        model: The base model, plain.
        held: Adapters by name; those that ``names`` has are brought to the model's device for the time of the block.
        names: One for each row, or ``"__base__"``.
        beams: How many rows generation makes of each.

    Yields:
        Whose the rows are; its ``assign`` names those of the next batch.
    """
    known = [name for name in dict.fromkeys(names) if name in held]
    rows = Rows(names, known, beams)
    for name in known:
        if more := held[name].more_than_layers():
            raise AdapterError(f"{name} cannot be the adapter of single rows, as it changes more than layers: {more}")
    twins = _twins(model, {name: held[name] for name in known})
    with contextlib.ExitStack() as stack:
        for name, layer, of_layer in twins:
            seat(layer, rows, of_layer, name)
            stack.callback(unseat, layer)
        stack.callback(take_fast_paths, model)
        leave_fast_paths(model, PerRow)
        yield rows


def _twins(model: nn.Module, held: Mapping[str, Held]) -> list[tuple[str, nn.Module, dict[str, nn.Module]]]:
    """For each layer that adapters change, by name, what it is with each of them."""
    modules = dict(canonical_modules(model))
    found: dict[str, dict[str, nn.Module]] = {}
    for name, adapter in held.items():
        for module, twin in _twins_of(modules, model, adapter).items():
            found.setdefault(module, {})[name] = twin
    for name in found:
        if any(isinstance(modules.get(each), nn.MultiheadAttention) for each in (name, name.rpartition(".")[0])):
            raise AdapterError(
                f"{name}: nn.MultiheadAttention reads weights for all rows at once, so that none has its own adapter"
            )
    inner = [name for name in found if any(name.startswith(f"{other}.") for other in found)]
    if inner:
        raise AdapterError(
            f"{inner[0]} is trained by one adapter and lies in what another trains in full: their rows cannot be "
            "computed in one batch"
        )
    return [(name, modules[name], twins) for name, twins in found.items()]


def _twins_of(modules: Mapping[str, nn.Module], model: nn.Module, held: Held) -> dict[str, nn.Module]:
    """What one adapter makes of layers, by name: adapted, or with values of its own (heads in full, biases)."""
    found: dict[str, nn.Module] = {}
    for name, parts in held.by_layer().items():
        twin = found[name] = twin_of(modules[name])
        r, scaling = held.layers[name]
        adapt(twin, r, scaling * r, scaling, held.config.lora_dropout, held.config.variant)
        for part, parameter in parts.items():
            _give(twin, part, parameter.detach())
    tops = _trained_as_a_whole(modules, model, held) if held.full else []
    for name, value in held.full.items():
        owner, _, local = name.rpartition(".")
        top = next((top for top in tops if f"{owner}.".startswith(f"{top}.")), owner)
        if top not in found:
            found[top] = twin_of(modules[top]) if top == owner else copy.deepcopy(modules[top])
        _give(found[top].get_submodule(owner[len(top) :].removeprefix(".")), local, value)
    return {name: twin.eval() if name in tops else _in_eval(twin) for name, twin in found.items()}


def _trained_as_a_whole(modules: Mapping[str, nn.Module], model: nn.Module, held: Held) -> list[str]:
    """Names of the modules that an adapter trains in full, outer ones first."""
    whole = resolve(modules[held.prefix], held.config, outside=model).in_full.values()
    ids = {id(module) for module in whole}
    return [name for name, module in modules.items() if id(module) in ids]


def _in_eval(twin: nn.Module) -> nn.Module:
    twin.training = False  # of this one alone: modules below it are the base's own
    return twin


def _give(module: nn.Module, local: str, value: Tensor) -> None:
    """Another value under a parameter's or buffer's name, the one that was there left as it is."""
    before: Tensor = getattr(module, local)
    value = value.to(before.device, before.dtype)
    if local in module._parameters:
        module._parameters[local] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[local] = value
