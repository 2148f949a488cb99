"""What an injected model knows of itself: where its adapters are, what trains, and what is not the frozen base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical, canonical_modules, join, unwrap
from lora_lightning.injection.replicate import Replicated
from lora_lightning.injection.starts.residual import settle_weight, starts_of
from lora_lightning.injection.tensors import spread_like
from lora_lightning.injection.tying import Untied
from lora_lightning.layers import LoraLayer, is_quantised
from lora_lightning.layers.tokens import TokenRows

RECORD = "_lora_injected"
ORIGINALS = "_lora_originals"
_SWITCHED = (LoraLayer, TokenRows)


@dataclass
class Injected:
    """The record that injection leaves on the root.

    Attributes:
        config: What was injected.
        seed: Seed of the first values.
        trainable_before: Names, below the root, of parameters that injection froze.
        statistics: Running statistics of normalisation layers as they were, by name below the root.
        bases: Adapter folders folded into the base before this one, oldest first.
        source: Adapter folder whose values were loaded, to go on from.
        still: Running statistics that training leaves as they are, by name below the root.
        replicated: The stack of layers that was built from the model's own, if one was.
        untied: Parameters that modules trained in full had in common with others before.
        followers: Layers tied to an embedding that is adapted or trained in full, each with the embedding's name.
        awaits_data: Whether the adapter is to begin as data show, and has not seen any yet.
        asked: The config as it was given, where data have changed ranks in it since.
    """

    config: LoraConfig
    seed: int
    trainable_before: tuple[str, ...] = ()
    statistics: dict[str, Tensor] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    source: str | None = None
    still: frozenset[str] = frozenset()
    replicated: Replicated | None = None
    untied: tuple[Untied, ...] = ()
    followers: dict[str, str] = field(default_factory=dict)
    awaits_data: bool = False
    asked: LoraConfig | None = None


def injected_roots(model: nn.Module) -> dict[str, nn.Module]:
    """Modules at or below ``model`` that carry a record of injection, by canonical name."""
    return {name: module for name, module in canonical_modules(unwrap(model)) if RECORD in vars(module)}


def record_of(root: nn.Module) -> Injected:
    """The record of an injected root."""
    return vars(root)[RECORD]


def the_root(model: nn.Module) -> tuple[str, nn.Module]:
    """The one injected root at or below ``model``.

    Raises:
        AdapterError: If there is none, or more than one.
    """
    roots = injected_roots(model)
    if not roots:
        raise AdapterError(
            f"this {type(unwrap(model)).__name__} has no adapter: call inject_lora(model, LoraConfig(...)) or "
            "load_adapter(model, folder) first"
        )
    if len(roots) > 1:
        raise AdapterError(f"several adapted modules here, name one of them: {', '.join(map(repr, roots))}")
    return next(iter(roots.items()))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Adapted layers at or below ``model``, by canonical name."""
    for name, module in canonical_modules(unwrap(model)):
        if isinstance(module, LoraLayer):
            yield name, module


def trained_in_full(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Modules whose own parameters train beside the adapter, with their values before: name, module, originals."""
    for name, module in canonical_modules(unwrap(model)):
        if ORIGINALS in vars(module):
            yield name, module, vars(module)[ORIGINALS]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that belong to the adapter, by canonical name: low-rank ones and those trained in full."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        found.update({join(name, part): tensor for part, tensor in (layer.lora_own | starts_of(layer)).items()})
    for name, module, originals in trained_in_full(model):
        found.update({join(name, local): getattr(module, local) for local in originals})
    return found


def refuse_disabled(model: nn.Module) -> None:
    """Raise inside :func:`lora_disabled`, where the model shows the base's values in the place of trained ones.

    Raises:
        AdapterError: If the adapter is switched off.
    """
    if any(not module.lora_enabled for _, module in canonical_modules(unwrap(model)) if isinstance(module, _SWITCHED)):
        raise AdapterError("the adapter is switched off here: leave the with block of lora_disabled(model) first")


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that train, by canonical name (no wrapper's part in it).

    Args:
        model: An injected model, or a LightningModule around one; of any other there are none.
    """
    tensors = adapter_tensors(model).items()
    return {name: p for name, p in tensors if isinstance(p, nn.Parameter) and p.requires_grad}


def weights_beside(model: nn.Module) -> dict[str, Tensor]:
    """The base weight of the layer that a low-rank parameter belongs to, by that parameter's canonical name."""
    return {join(name, part): layer.weight for name, layer in lora_layers(model) for part in layer.lora_own}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All that is not the frozen base, by canonical name; the tensors are the model's own, not copies.

    Inside an injected root these are the adapter's tensors and the running statistics of normalisation layers, which
    move although nothing trains there (unless they have been frozen); outside it (a LightningModule around a network),
    everything but frozen parameters.

    Args:
        model: An injected model, or a LightningModule around one.

    Raises:
        AdapterError: If the model has no adapter.
    """
    still = still_statistics(model)
    return {name: value for name, (_, value) in _kept(model).items() if name not in still}


@torch.no_grad()
def load_lora_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put back what :func:`lora_state_dict` gave, in place and as a whole; running statistics where there are some.

    Args:
        model: An injected model, wrapped or not.
        state: Tensors by canonical name: whole ones, also where the model's are spread over processes.
        source: What to call their origin in a message.

    Raises:
        AdapterError: If names or shapes differ, or the model has no memory for a value; nothing has been changed then.
    """
    kept = _kept(model, also=state.keys())
    optional = set(_running_statistics(model)) - state.keys()
    problems = differences({name: value for name, (_, value) in kept.items() if name not in optional}, state)
    if lost := [name for name in state.keys() & kept.keys() if getattr(kept[name][1], "is_meta", False)]:
        problems.append(
            f"no memory yet (meta device), values would be lost: {_some(lost)}. Fill the model first: load_base(model, "
            "folder)"
        )
    if problems:
        raise AdapterError(f"{source} does not fit this model:" + "".join(f"\n  - {line}" for line in problems))
    for name, value in state.items():
        module, now = kept[name]
        local = name.rpartition(".")[2]
        given = spread_like(value, now) if isinstance(value, Tensor) else value
        errors: list[str] = []
        module._load_from_state_dict({local: given}, "", {}, False, [], [], errors)
        if errors:
            raise AdapterError(f"{source} does not fit this model: {errors[0]}")
    for _, layer in lora_layers(model):
        settle_weight(layer)
    for root in injected_roots(model).values():
        record_of(root).awaits_data = False


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Missing names, names that are too many, and shapes that differ, a line each."""
    problems = []
    for what, names in (("missing", expected.keys() - given.keys()), ("not expected", given.keys() - expected.keys())):
        if names:
            problems.append(f"{what}: {_some(names)}")
    shapes = [
        f"{name} is {tuple(given[name].shape)}, the model's is {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and isinstance(value, Tensor) and given[name].shape != value.shape
    ]
    return problems + shapes[:4] + ([f"{len(shapes) - 4} more shapes differ"] if shapes[4:] else [])


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if listed[4:] else "")


def _kept(model: nn.Module, also: Collection[str] = ()) -> dict[str, tuple[nn.Module, Tensor]]:
    """Canonical name to (module that has it, tensor) of all that is not the frozen base.

    What stands outside an injected root and is frozen counts where ``also`` names it: it trained, and may again.
    """
    roots = injected_roots(model)
    if not roots:
        the_root(model)  # raises, with what to do
    own = adapter_tensors(model).keys()
    moving = set(_running_statistics(model))
    frozen = {canonical(name) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept: dict[str, tuple[nn.Module, Tensor]] = {}
    for prefix, module in canonical_modules(unwrap(model)):
        for local, value in _own_state(module).items():
            name = join(prefix, local)
            inside = any(root == "" or name.startswith(f"{root}.") for root in roots)
            if name in own or name in moving or not (inside or (name in frozen and name not in also)):
                kept[name] = (module, value)
    return kept


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own part of its state dict; of the whole, a sharding engine's hooks would gather the base."""
    found: dict[str, Tensor] = {}
    module._save_to_state_dict(found, "", False)
    if is_quantised(module):  # what its library adds to the weight is of the frozen base, as that is
        return {local: t for local, t in found.items() if local in module._parameters or local in module._buffers}
    return found


def _running_statistics(model: nn.Module) -> Iterator[str]:
    for name, module in canonical_modules(unwrap(model)):
        if isinstance(module, _NormBase):
            yield from (join(name, local) for local, _ in module.named_buffers(recurse=False))


def copy_statistics(root: nn.Module) -> dict[str, Tensor]:
    """The running statistics below a root, which move although their layers are frozen."""
    buffers = dict(root.named_buffers())
    found = {canonical(name): value for name, value in buffers.items()}
    return {name: found[name].clone() for name in _running_statistics(root) if name in found}


def freeze_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Put normalisation layers with running statistics in a frozen base into eval mode, in which those stay.

    Returns:
        Them by name; layers that train in full, and those outside an injected root, are left alone.
    """
    full = {id(module) for _, module, _ in trained_in_full(model)}
    frozen: dict[str, nn.Module] = {}
    for prefix, root in injected_roots(model).items():
        below = {
            name: module.eval()
            for name, module in canonical_modules(root)
            if isinstance(module, _NormBase) and module.track_running_stats and id(module) not in full
        }
        record_of(root).still = frozenset(join(name, b) for name, module in below.items() for b in module._buffers)
        frozen |= {join(prefix, name): module for name, module in below.items()}
    return frozen


def still_statistics(model: nn.Module) -> set[str]:
    """Names of the running statistics that :func:`freeze_statistics` has settled."""
    return {join(prefix, name) for prefix, root in injected_roots(model).items() for name in record_of(root).still}


def swap(module: nn.Module, local: str, value: Tensor) -> Tensor:
    """Show another value under a parameter's or buffer's name; returns the value that was there."""
    tensor: Tensor = getattr(module, local)
    before = tensor.data
    tensor.data = value.to(device=before.device, dtype=before.dtype)
    return before


@torch.no_grad()
def copy_originals(module: nn.Module, names: list[str]) -> None:
    """Keep the values that a module has now, on the CPU, as those of the base."""
    now: dict[str, Tensor] = {name: getattr(module, name).detach() for name in names}
    vars(module)[ORIGINALS] = {name: t.clone() if t.is_meta else t.to("cpu", copy=True) for name, t in now.items()}
