"""The mathematics of many low-rank updates of one weight, each for the rows of its own slot.

Shapes: ``n`` slots, each with ``M`` tokens (the rows of its batch, all as wide as the widest); ``in``/``out`` the sides
of the weight; ``r`` the largest rank that a slot has on a layer, ``R`` the sum of these over the layers on one input.
An adapter of a smaller rank, or none, is filled up with zeros, whose gradients are zero. Slots meet in the product with
the weight alone, which works on each row by itself: nothing of one slot can reach another, a NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.layers.dropout import without
from lora_lightning.layers.functional import as_forward, shaped


class Packed(NamedTuple):
    """The tensors of one layer, less ``A``."""

    weight: Tensor
    """``(out, in)``, frozen."""
    bias: Tensor | None
    """``(out,)``, frozen."""
    b: Tensor
    """``B`` transposed, ``(n, r, out)``."""


def packed_linears(
    x: Tensor, dropped: Tensor | None, scales: Tensor, a: Tensor, layers: Sequence[Packed]
) -> tuple[Tensor, ...]:
    """``y_i = x_i Wᵀ + b + k_i · (kept(x_i) A_iᵀ) B_iᵀ`` of each slot ``i``, for layers on one input.

    Args:
        x: ``(n·rows, T, in)``, slot by slot.
        dropped: What is left out on the way to ``A``: places in flattened ``x``, ``(k,)`` int64, or a mask,
            ``(n·M, in)`` bool; None leaves out nothing.
        scales: ``k``, ``(n, 1, R)``: the scale of each slot and layer, divided by the share that dropout keeps.
        a: ``(n, R, in)``.
        layers: The rest of each layer.

    Returns:
        ``(n·rows, T, out)`` for each layer.
    """
    x, a, layers = in_one_dtype(x, a, layers)
    tensors = [tensor for layer in layers for tensor in layer]
    return _PackedLinears.apply(x, dropped, scales.to(x.dtype), a, *tensors)


def in_one_dtype(x: Tensor, a: Tensor, layers: Sequence[Packed]) -> tuple[Tensor, Tensor, Sequence[Packed]]:
    """All in the dtype of the arithmetic: autocast's where it is on, else the input's for the adapters."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        layers = [
            Packed(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype), layer.b)
            for layer in layers
        ]
    dtype = x.dtype
    if a.dtype == dtype and all(layer.b.dtype == dtype for layer in layers):
        return x, a, layers
    return x, a.to(dtype), [layer._replace(b=layer.b.to(dtype)) for layer in layers]


def forward_of(
    x: Tensor, dropped: Tensor | None, scales: Tensor, a: Tensor, layers: Sequence[Packed]
) -> tuple[list[Tensor], Tensor]:
    """Outputs, ``(n·M, out)`` each, and ``u = k · kept(x) Aᵀ``, ``(n, M, R)``; ``x`` is ``(n·M, in)``."""
    return outputs_of(x, x if dropped is None else without(x, dropped, 0.0), scales, a, layers)


def outputs_of(
    x: Tensor, kept: Tensor, scales: Tensor, a: Tensor, layers: Sequence[Packed]
) -> tuple[list[Tensor], Tensor]:
    """The same for what is kept of ``x``."""
    n = len(a)
    u = torch.bmm(by_slot(kept, n), a.transpose(1, 2)).mul_(scales)
    outs = []
    for layer, part in zip(layers, parts(u, layers), strict=True):
        out = F.linear(x, layer.weight, layer.bias)
        by_slot(out, n).baddbmm_(part, layer.b)
        outs.append(out)
    return outs, u


def backward_of(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    dropped: Tensor | None,
    u: Tensor,
    scales: Tensor,
    a: Tensor,
    layers: Sequence[Packed],
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of :func:`forward_of`: ``(n·M, in)``, ``(n, R, in)``, and ``(n, r, out)`` for each layer.

    With ``g = k · dy B``: ``dA = gᵀ kept(x)``, ``dBᵀ = uᵀ dy``, ``dx = dy W + kept'(g A)``.

    Args:
        dys: ``(n·M, out)`` each; None where a layer's output was not used.
        x: ``(n·M, in)``; may be None where ``A`` wants no gradient.
        dropped: As forward.
        u: As forward gave it.
        scales: As forward.
        a: As forward.
        layers: As forward.
        needs: Which gradients are wanted.
    """
    if all(dy is None for dy in dys):
        return None, None, [None] * len(layers)
    g = into_rank(dys, scales, a, layers) if needs.x or needs.a else None
    dx = None
    if needs.x and g is not None:
        for dy, layer in zip(dys, layers, strict=True):
            if dy is not None:
                dx = dy @ layer.weight if dx is None else dx.addmm_(dy, layer.weight)
        assert dx is not None
        add_product(dx, g, a, dropped)
    da = None
    if needs.a and g is not None and x is not None:
        da = gradient_of_a(g, x if dropped is None else without(x, dropped, 0.0))
    return dx, da, gradients_of_b(dys, u, layers, needs)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    a: bool
    b: tuple[bool, ...]


def into_rank(dys: Sequence[Tensor | None], scales: Tensor, a: Tensor, layers: Sequence[Packed]) -> Tensor:
    """``g = k · dy B``: ``(n·M, out)`` each to ``(n, M, R)``."""
    n = len(a)
    if len(layers) == 1 and dys[0] is not None:
        return torch.bmm(by_slot(dys[0], n), layers[0].b.transpose(1, 2)).mul_(scales)
    some = next(dy for dy in dys if dy is not None)
    g = some.new_empty(n, len(some) // n, a.shape[1])
    for dy, layer, part in zip(dys, layers, parts(g, layers), strict=True):
        if dy is None:
            part.zero_()
        else:
            part.copy_(torch.bmm(by_slot(dy, n), layer.b.transpose(1, 2)))
    return g.mul_(scales)


def add_product(dx: Tensor, g: Tensor, a: Tensor, dropped: Tensor | None) -> None:
    """Add ``g A`` to ``dx``, ``(n·M, in)``, in place, but for what is dropped."""
    dx_slots = by_slot(dx, len(a))
    if dropped is None:
        dx_slots.baddbmm_(g, a)
    elif dropped.dtype == torch.bool:
        dx.add_(torch.bmm(g, a).view_as(dx).masked_fill_(dropped, 0))
    else:
        flat = dx.view(-1)
        before = flat[dropped]
        dx_slots.baddbmm_(g, a)
        flat[dropped] = before


def gradient_of_a(g: Tensor, kept: Tensor) -> Tensor:
    """``gᵀ kept(x)``: ``(n, R, in)``."""
    return torch.bmm(g.transpose(1, 2), by_slot(kept, len(g)))


def gradients_of_b(
    dys: Sequence[Tensor | None], u: Tensor, layers: Sequence[Packed], needs: Needs
) -> list[Tensor | None]:
    """``uᵀ dy`` of each layer: ``(n, r, out)``."""
    return [
        torch.bmm(part.transpose(1, 2), by_slot(dy, len(u))) if dy is not None and wanted else None
        for dy, part, wanted in zip(dys, parts(u, layers), needs.b, strict=True)
    ]


def by_slot(tensor: Tensor, n: int) -> Tensor:
    """``(n·M, d) -> (n, M, d)``."""
    return tensor.view(n, -1, tensor.shape[-1])


def parts(joined: Tensor, layers: Sequence[Packed]) -> Sequence[Tensor]:
    """``(n, M, R)``, layer by layer."""
    return [joined] if len(layers) == 1 else joined.split([layer.b.shape[1] for layer in layers], dim=2)


def grouped(tensors: Sequence[Any]) -> list[Packed]:
    """Layers again, from a flat list of weight, bias and ``B`` of each."""
    return [Packed(*tensors[place : place + 3]) for place in range(0, len(tensors), 3)]


class _PackedLinears(torch.autograd.Function):
    """Layers on one input. It is saved once, and its dropped-out copy is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, scales: Tensor, a: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = grouped(tensors)
        x_flat = x.reshape(-1, x.shape[-1])
        outs, u = forward_of(x_flat, dropped, scales, a, layers)
        ctx.set_materialize_grads(False)
        ctx.leading = x.shape[:-1]
        ctx.needs = needs = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[3], tuple(ctx.needs_input_grad[6::3]))
        ctx.save_for_backward(x if needs.a else None, dropped, u, scales, a, *tensors)
        return tuple(shaped(out, x) for out in outs)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, dropped, u, scales, a, *tensors = ctx.saved_tensors
        layers = grouped(tensors)
        dx, da, dbs = backward_of(
            [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys],
            None if x is None else x.reshape(-1, x.shape[-1]),
            dropped,
            u,
            scales,
            a,
            layers,
            ctx.needs,
        )
        dx = None if dx is None else dx.view(*ctx.leading, dx.shape[-1])
        return dx, None, None, da, *(grad for db in dbs for grad in (None, None, db))
