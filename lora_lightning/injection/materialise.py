"""Parameters without memory (on the meta device), and how each process gets its own part of them.

A model built under :func:`meta_parameters`, sharded, and then filled has never been whole anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lora_lightning.injection.beside import token_rows
from lora_lightning.injection.initialise import first_values, generator_for
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.starts.residual import starts_of
from lora_lightning.injection.state import (
    adapter_tensors,
    copy_originals,
    copy_statistics,
    injected_roots,
    lora_layers,
    record_of,
    trained_in_full,
)
from lora_lightning.layers.tokens import TokenRows

Part = tuple[slice, ...]


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules made inside the ``with`` block have parameters without memory, and buffers as ever.

    ``with torch.device("meta")`` would take the values of buffers too, and those that no file holds (a rotary
    embedding's frequencies) nobody could give back. Not for several threads at once.

    >>> with meta_parameters():
    ...     layer = nn.BatchNorm1d(3)
    >>> layer.weight.is_meta, layer.running_var
    (True, tensor([1., 1., 1.]))
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(eq=False)
class Place:
    """A parameter or persistent buffer with all the names and modules under which it is registered.

    Attributes:
        tensor: The model's tensor.
        names: Canonical names; several where weights are tied.
        owners: Modules and their local names of it, in the order of ``names``.
    """

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @torch.no_grad()
    def fill(self, read: Callable[[Part], Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
        """Give the tensor its values.

        Args:
            read: Gives a part of the whole tensor.
            device: Where the values go if the tensor has no memory yet; one that has stays where it is.
            dtype: What to turn a floating-point tensor without memory into; None keeps its own.
        """
        if not self.tensor.is_meta:
            here = self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor
            here.copy_(read(part_of(self.tensor)))
            return
        cast = dtype if dtype is not None and self.tensor.is_floating_point() else self.tensor.dtype
        part = part_of(self.tensor)
        local = torch.empty([s.stop - s.start for s in part], dtype=cast, device=device).copy_(read(part))
        self._register(like(self.tensor, local))

    def _register(self, value: Tensor) -> None:
        """One tensor under all names, so that tied weights stay tied."""
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        for module, local in self.owners:
            registry: dict[str, Any] = module._parameters if local in module._parameters else module._buffers
            registry[local] = value
        self.tensor = value


def places(model: nn.Module) -> list[Place]:
    """Every parameter and persistent buffer of a model once."""
    found: dict[int, Place] = {}
    for prefix, module in canonical_modules(model):
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for local, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                place = found.setdefault(id(tensor), Place(tensor))
                place.names.append(f"{prefix}.{local}" if prefix else local)
                place.owners.append((module, local))
    return list(found.values())


def part_of(tensor: Tensor) -> Part:
    """Which part of the whole this process has: all of it, or its part of a ``DTensor``.

    >>> part_of(torch.empty(2, 3))
    (slice(0, 2, None), slice(0, 3, None))
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def like(model: Tensor, local: Tensor) -> Tensor:
    """A tensor laid out over processes as another is, from this process's part."""
    if not isinstance(model, DTensor):
        return local
    mesh, placements = model.device_mesh, model.placements
    whole = torch.empty(model.shape, device="meta")
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def start_adapters(model: nn.Module, device: torch.device) -> None:
    """Give adapters without memory the values that injection would have given them, each process its part of them.

    What injection remembers of the base's own values is taken anew: there were none when it ran.
    """
    for root in injected_roots(model).values():
        record = record_of(root)
        by_id = {id(place.tensor): place for place in places(root)}
        for name, layer in lora_layers(root):
            if not layer.lora_own:
                continue  # a head that has the adapter of the embedding it is tied to
            unfilled = layer.lora_A.is_meta or layer.lora_B.is_meta
            if unfilled:
                for buffer in starts_of(layer).values():
                    by_id[id(buffer)].fill(torch.zeros(buffer.shape).__getitem__, device, None)
                values = first_values(layer, record.config, generator_for(record.seed, name))
                for parameter, value in zip((layer.lora_A, layer.lora_B), values, strict=True):
                    by_id[id(parameter)].fill(value.__getitem__, device, None)
            if unfilled or record.source is None:  # what follows from the base's weights, which are others now
                for part, value in layer.lora_derived().items():
                    by_id[id(getattr(layer, part))].fill(value.__getitem__, device, None)
        for _, rows in token_rows(root):
            if rows.trainable_tokens_delta.is_meta:
                by_id[id(rows.trainable_tokens_delta)].fill(rows.lora_base_rows().__getitem__, device, None)
        if any(value.is_meta for value in record.statistics.values()):
            record.statistics = copy_statistics(root)
    for _, module, originals in trained_in_full(model):
        if any(value.is_meta for value in originals.values()):
            copy_originals(module, list(originals))


def low_rank_ids(model: nn.Module) -> set[int]:
    """Ids of the low-rank parameters, which no base has."""
    in_full = {
        id(getattr(module, local))
        for _, module, originals in trained_in_full(model)
        if not isinstance(module, TokenRows)
        for local in originals
    }
    return {id(tensor) for tensor in adapter_tensors(model).values()} - in_full
