"""Starts that take their ``A₀`` and ``B₀`` out of the base: ``W_res = W − s · B₀ A₀``, and the way back to the bit.

``A₀`` and ``B₀`` are buffers beside ``A`` and ``B``, saved in checkpoints with them: a run that goes on makes the same
``W_res`` of the same ``W``. The weight as it was is kept on the CPU, since ``W_res + s · B₀ A₀`` rounds to something
else: a changed layer's weight takes its size once more in the machine's memory, for each process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.errors import AdapterError
from lora_lightning.injection.tensors import local, spread_like, whole
from lora_lightning.layers import LoraLayer

BEFORE = "_lora_before"
START = "_start"
"""Ends the names of the buffers: ``lora_A_start`` has what ``lora_A`` began with."""


def add_starts(layer: LoraLayer) -> None:
    """Give a layer the buffers of a start that changes its weight; zero as yet, which changes nothing."""
    for name in ("lora_A", "lora_B"):
        layer.register_buffer(name + START, torch.zeros_like(getattr(layer, name), requires_grad=False))


def starts_of(layer: LoraLayer) -> dict[str, Tensor]:
    """The buffers of a layer that have first values of its parameters; none where its weight is the base's."""
    return {name: buffer for name, buffer in layer._buffers.items() if name.endswith(START) and buffer is not None}


def weight_before(layer: nn.Module) -> Tensor | None:
    """The whole base weight of a layer on the CPU, where a start has changed it."""
    return vars(layer).get(BEFORE)


@torch.no_grad()
def keep_weight(layer: LoraLayer) -> Tensor:
    """Keep the weight as it is now as the base's, all of it on every process, unless one is kept already."""
    if BEFORE not in vars(layer):
        vars(layer)[BEFORE] = whole(layer.weight.detach()).to("cpu", copy=True)
        if starts_of(layer):
            layer.register_load_state_dict_pre_hook(_keep_loaded)
    return vars(layer)[BEFORE]


@torch.no_grad()
def _keep_loaded(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where somebody loads a weight into a changed layer, let the base's be the one that goes with it.

    A state with first values beside the weight is of a model that was changed like this one; one without is a base's.
    """
    before, weight = vars(layer).get(BEFORE), state.get(f"{prefix}weight")
    if before is None or not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.shape != before.shape:
        return  # another shape is told by those who load
    names = [f"lora_{part}{START}" for part in "AB"]
    exact = torch.promote_types(before.dtype, torch.float32)
    there = all(f"{prefix}{name}" in state for name in names)
    a, b = ((state[f"{prefix}{name}"] if there else getattr(layer, name)).to(weight.device, exact) for name in names)
    delta = oriented(layer, layer.lora_scaling * (b @ a))
    if not there:
        vars(layer)[BEFORE] = weight.to("cpu", before.dtype, copy=True)
        state[f"{prefix}weight"] = (weight.to(exact) - delta).to(weight.dtype)
        return
    base = (weight.to(exact) + delta).cpu()
    rounding = 8 * torch.finfo(before.dtype).eps * float(before.abs().max())
    if not torch.allclose(base, before.to(exact), rtol=0, atol=rounding):  # else what is kept is to the bit
        vars(layer)[BEFORE] = base.to(before.dtype)


@torch.no_grad()
def take_out_start(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Begin with ``A₀ (r, in)`` and ``B₀ (out, r)``: the layer's outputs stay what they were."""
    for name, value in (("lora_A", a), ("lora_B", b)):
        getattr(layer, name + START).copy_(value)
    settle_weight(layer)


@torch.no_grad()
def settle_weight(layer: LoraLayer) -> None:
    """Make the weight what ``A₀`` and ``B₀`` leave of the base's, ``W − s · B₀ A₀``, rounded once."""
    starts = starts_of(layer)
    if not starts or layer.weight.is_meta or starts["lora_A_start"].is_meta:
        return
    if weight_before(layer) is None and not starts["lora_B_start"].any():
        return
    exact = torch.promote_types(layer.weight.dtype, torch.float32)
    a, b = (starts[name].to(exact) for name in ("lora_A_start", "lora_B_start"))
    delta = oriented(layer, layer.lora_scaling * (b @ a))
    before = keep_weight(layer)
    here = local(layer.weight)
    taken = part_like(delta, layer.weight).to(here.device)
    here.copy_(part_like(before, layer.weight).to(here.device, exact) - taken)


def settle_again(layers: Iterable[LoraLayer]) -> None:
    """The same once devices or dtypes have changed, so that a run that goes on from a checkpoint has the same weights.

    Left as they are where an engine has flattened them meanwhile.
    """
    for layer in layers:
        before = weight_before(layer)
        if before is not None and before.shape == layer.weight.shape:
            settle_weight(layer)


@torch.no_grad()
def replace_weight(layer: LoraLayer, weight: Tensor) -> None:
    """Give a layer another weight ``(out, in)``, the whole of it, and keep the base's."""
    keep_weight(layer)
    local(layer.weight).copy_(part_like(oriented(layer, weight), layer.weight))


@torch.no_grad()
def put_back(layer: nn.Module, before: Tensor) -> None:
    """Give a layer the base's weight again, bit for bit."""
    here = local(layer.weight)  # type: ignore[arg-type]
    here.copy_(part_like(before, layer.weight))  # type: ignore[arg-type]


def forget_start(layer: LoraLayer) -> None:
    """Leave no trace of a start but the weight as it is now."""
    for name in starts_of(layer):
        delattr(layer, name)
    for name in (BEFORE, "lora_still"):
        vars(layer).pop(name, None)
    hooks = layer._load_state_dict_pre_hooks
    for number in [n for n, hook in hooks.items() if getattr(hook, "hook", None) is _keep_loaded]:
        del hooks[number]


@contextmanager
def bases_as_before(layers: list[LoraLayer]) -> Iterator[None]:
    """The base's own weights inside the ``with`` block.

    What autograd has saved stays valid: no version is counted, and the values are back before a backward.
    """
    shown: list[tuple[Tensor, Tensor]] = []
    try:
        for layer in layers:
            if (before := weight_before(layer)) is not None:
                weight = layer.weight if local(layer.weight) is layer.weight else local(layer.weight.detach())
                kept = weight.data
                value = part_like(before, layer.weight).to(kept.device, kept.dtype)
                if weight is layer.weight:
                    shown.append((weight, kept))
                    weight.data = value
                else:
                    shown.append((weight, kept.clone()))
                    weight.data.copy_(value)
        yield
    finally:
        for weight, kept in shown:
            if isinstance(weight, nn.Parameter):
                weight.data = kept
            else:
                weight.data.copy_(kept)


def part_like(value: Tensor, weight: Tensor) -> Tensor:
    """This process's part of the whole value of a weight."""
    if value.shape != weight.shape:
        raise AdapterError(
            f"a weight that was {tuple(value.shape)} when its adapter began is {tuple(weight.shape)} now: an engine "
            "has flattened or split it since. Use strategy='ddp', or a start that leaves the base as it is"
        )
    return local(spread_like(value, weight))


def oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """``(out, in)`` to the shape in which a layer stores its weight, and back: transposed for Conv1D and embeddings."""
    return matrix.t() if getattr(layer, "lora_kind", None) in ("Conv1D", "Embedding") else matrix
