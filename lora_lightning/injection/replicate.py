"""Another stack of decoder layers from a model's own (``layer_replication``), and the way back.

Source: the passthrough merges of SOLAR (arXiv 2312.15166) and its like, as in PEFT; copies share the base's weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import LoraConfigError

_COUNT = "num_hidden_layers"
_NUMBER = "layer_idx"


_Place = tuple[nn.Module, str]


@dataclass
class Replicated:
    """What it takes to go between a model's own stack of layers and the one built from it.

    Attributes:
        parent: The module that has the list of layers.
        local: The list's name there.
        stacks: The list before and after.
        numbers: Each part of a layer that knows the layer's number, with that number before and after.
        settings: Of the model's configs: (config, name, value before, value after).
        left_out: Each tensor of layers that the new stack has not, as (module, name), with one that leads it.
    """

    parent: nn.Module
    local: str
    stacks: tuple[nn.ModuleList, nn.ModuleList]
    numbers: list[tuple[nn.Module, int, int]] = field(default_factory=list)
    settings: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    left_out: list[tuple[_Place, _Place]] = field(default_factory=list)

    def show(self, side: int) -> None:
        """Give the model its own stack (0), or the one that was built (1)."""
        if side == 0:
            self._follow()
        self.parent._modules[self.local] = self.stacks[side]
        for module, *number in self.numbers:
            setattr(module, _NUMBER, number[side])
        for config, name, *value in self.settings:
            vars(config)[name] = value[side]  # past checks of a config that is half changed

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring layers that were left out to the mode, device and dtype that the model has come to without them."""
        own, shown = self.stacks
        own.training = shown.training
        there = {id(layer) for layer in shown}
        for layer in own:
            if id(layer) not in there and layer.training != shown[0].training:
                layer.train(shown[0].training)
        for (module, name), (other, its) in self.left_out:
            tensor, like = getattr(module, name), getattr(other, its)
            if like.is_meta or tensor.is_meta:
                continue
            if tensor.device != like.device:
                module.to(like.device)  # what belongs to a quantised weight goes with it
            if tensor.dtype != like.dtype:
                tensor.data = tensor.data.to(like.dtype)


def replicate_layers(root: nn.Module, spans: Sequence[Sequence[int]]) -> Replicated:
    """Put a stack of layers into a model's place for them that is made of spans of its own: ``[[0, 4], [2, 5]]``.

    The first time that a layer is used it is the layer itself, after that a copy which shares its parameters. Where a
    layer's parts know its number (for the cache of keys and values) they get the new one, and of the model's config
    the number of layers follows, with everything in it that lists a value for each layer.

    Args:
        root: A model of transformers whose layers are called ``layers``, ``encoder.layer`` or ``h``, or one like it.
        spans: ``[first, end)`` of layer numbers, in order.

    Returns:
        What takes the model back, and forth again.

    Raises:
        LoraConfigError: If there is no such list of layers, or a span is longer than it.
    """
    parent, local = _stack_of(root)
    own: nn.ModuleList = parent._modules[local]  # type: ignore[assignment]
    order = [number for first, end in spans for number in range(first, end)]
    if max(order) >= len(own):
        raise LoraConfigError(
            f"layer_replication names layer {max(order)}, and the model has {len(own)} layers, 0 to {len(own) - 1}; "
            "the end of a span is the number behind its last layer"
        )
    used: set[int] = set()
    layers: list[nn.Module] = []
    for number in order:
        layers.append(_sharing_copy(own[number]) if number in used else own[number])
        used.add(number)
    made = Replicated(parent, local, (own, nn.ModuleList(layers)))
    made.stacks[1].training = own.training
    made.numbers = [
        (part, getattr(part, _NUMBER), new)
        for new, layer in enumerate(layers)
        for part in layer.modules()
        if isinstance(getattr(part, _NUMBER, None), int)
    ]
    made.left_out = list(_followed([layer for number, layer in enumerate(own) if number not in used], layers))
    made.settings = list(_settings(root, len(own), order))
    made.show(1)
    return made


@contextlib.contextmanager
def taken_back_on_error(replicated: Replicated | None) -> Iterator[None]:
    """Give the model its own stack back if the ``with`` block fails."""
    try:
        yield
    except BaseException:
        if replicated is not None:
            replicated.show(0)
        raise


@contextlib.contextmanager
def as_before(replicated: Replicated | None) -> Iterator[None]:
    """The model's own stack of layers inside the ``with`` block."""
    if replicated is None:
        yield
        return
    replicated.show(0)
    try:
        yield
    finally:
        replicated.show(1)


def _sharing_copy(layer: nn.Module) -> nn.Module:
    """A copy with the same parameters, and the model's own config where a part has it."""
    shared = [*layer.parameters(), *_configs(layer)]
    return copy.deepcopy(layer, {id(each): each for each in shared})


def _followed(left_out: Sequence[nn.Module], shown: Sequence[nn.Module]) -> Iterator[tuple[_Place, _Place]]:
    """For each tensor of layers, one of another layer that is on its device and of its dtype: its namesake, or any."""
    alike: dict[tuple[Any, ...], _Place] = {}
    for layer in shown:
        for path, place, tensor in _tensors(layer):
            alike.setdefault((path, tensor.device, tensor.dtype), place)
            alike.setdefault((tensor.device, tensor.dtype), place)
    for layer in left_out:
        for path, place, tensor in _tensors(layer):
            like = alike.get((path, tensor.device, tensor.dtype)) or alike.get((tensor.device, tensor.dtype))
            if like is not None:
                yield place, like


def _tensors(layer: nn.Module) -> Iterator[tuple[str, _Place, torch.Tensor]]:
    for path, module in layer.named_modules():
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                yield f"{path}.{name}", (module, name), tensor


def _configs(module: nn.Module) -> list[Any]:
    found = (vars(part).get("config") for part in module.modules())
    return list({id(config): config for config in found if config is not None}.values())


def _stack_of(root: nn.Module) -> tuple[nn.Module, str]:
    """The module that has a model's list of layers, and the list's name; found where PEFT finds it."""
    module = root
    for name in ("model", "bert", str(getattr(root, "base_model_prefix", "")) or "model"):
        while isinstance(inner := module._modules.get(name), nn.Module):
            module = inner
    for path in ("layers", "encoder.layer", "h"):
        above, _, local = path.rpartition(".")
        with contextlib.suppress(AttributeError):
            parent = module.get_submodule(above)
            if isinstance(parent._modules.get(local), nn.ModuleList):
                return parent, local
    raise LoraConfigError(
        f"layer_replication: no list of layers found in a {type(root).__name__}; looked for layers, encoder.layer and "
        f"h in its {type(module).__name__}"
    )


def _settings(root: nn.Module, count: int, order: Sequence[int]) -> Iterator[tuple[Any, str, Any, Any]]:
    """The number of layers, and lists with a value for each layer, of every config in the model."""
    for config in _configs(root):
        if getattr(config, _COUNT, None) != count:
            continue
        number = getattr(config, "attribute_map", {}).get(_COUNT, _COUNT)  # GPT-2 calls it n_layer
        for name, value in vars(config).items():
            if name == number:
                yield config, name, value, len(order)
            elif isinstance(value, list) and len(value) == count:
                yield config, name, value, [value[number] for number in order]
