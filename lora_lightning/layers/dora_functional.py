"""The mathematics of DoRA: ``y = m/‖W + s B A‖ ⊙ (x Wᵀ + s · drop(x) Aᵀ Bᵀ) + b``, the norm without a gradient.

Shapes: ``T`` tokens, ``in``/``out`` the sides of the weight, ``r`` the rank. Below, ``z`` is what stands in brackets
and ``c = m/‖…‖``, one number for each output. Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.

The paper's authors and PEFT also drop ``x`` on the way to ``(c - 1) ⊙ x Wᵀ`` in training, which takes a second product
with ``W`` in both passes; the mean is the same, and so is everything where there is no dropout. Here ``W`` always sees
the whole ``x``, as it does without DoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.layers.functional import (
    Adapted,
    Needs,
    as_forward,
    backward_of,
    forward_of,
    in_one_dtype,
    low_rank,
    written_out,
)


class Scaled(NamedTuple):
    """The tensors of one linear layer with DoRA."""

    adapted: Adapted
    """Those it has without DoRA."""
    magnitude: Tensor
    """``m``, ``(out,)``."""
    norm: Tensor
    """``‖W + s B A‖`` of each output, ``(out,)``, in float32 at least; no gradient goes through it."""


def dora_linears(x: Tensor, layers: Sequence[Scaled], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """``y = m/norm ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b`` of layers on one input, which share one draw of the dropout.

    Args:
        x: Input, ``(..., in)``.
        layers: The layers' tensors.
        dropout: Probability of dropping an element of ``x`` on its way to ``A``; 0 outside training.

    Returns:
        ``(..., out)`` for each layer, in the dtype of ``x`` (autocast's where it is on).
    """
    x, adapted = in_one_dtype(x, [layer.adapted for layer in layers])
    if written_out(x, adapted) and all(written_out(layer.magnitude, []) for layer in layers):
        scalings = tuple(layer.scaling for layer in adapted)
        tensors = [t for a, layer in zip(adapted, layers, strict=True) for t in (*a[:4], layer.magnitude, layer.norm)]
        return _DoraLinears.apply(x, dropout, scalings, *tensors)
    return tuple(
        _composed(x, a, ratio(layer.magnitude, layer.norm), dropout) for a, layer in zip(adapted, layers, strict=True)
    )


def _composed(x: Tensor, layer: Adapted, c: Tensor, dropout: float) -> Tensor:
    z = F.linear(x, layer.weight) + low_rank(x, layer.a, layer.b, layer.scaling, dropout)
    y = (z * c).to(x.dtype)
    return y if layer.bias is None else y + layer.bias


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = m/norm``, ``(out,)``; 1 where the norm is zero, since there is nothing to scale."""
    norm = _as_stored(norm, magnitude)
    return torch.where(norm == 0, 1, magnitude / norm)


def _as_stored(norm: Tensor, magnitude: Tensor) -> Tensor:
    """A norm with the digits that a magnitude has: one of half precision began as the rounded norm, a ratio of one."""
    return norm.detach().to(magnitude.dtype).to(norm.dtype)


class _DoraLinears(torch.autograd.Function):
    """Forward and backward written out.

    With ``d = dy ⊙ c`` the gradients are those of the layer without DoRA for ``d``, and ``dm = Σ dy ⊙ z / norm`` over
    tokens. Without a bias ``z`` is taken back from the output, ``z = y / c``, which the next operation most often
    keeps anyway; where something has overwritten the output since, it is computed again. A ``c`` too small for that
    counts as the smallest that is not. With a bias, a large one would leave too few digits of ``z``: it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = [_Layer(*part) for part in _parts(tensors, 6)]
        adapted = [layer.adapted(scaling) for layer, scaling in zip(layers, scalings, strict=True)]
        zs, dropped, xas = forward_of(x.reshape(-1, x.shape[-1]), dropout, adapted)
        needs_x, needs = ctx.needs_input_grad[0], [_Layer(*part) for part in _parts(ctx.needs_input_grad[3:], 6)]
        ys: list[Tensor] = []
        ctx.watches, saved = [], []
        for layer, z, xa, need in zip(layers, zs, xas, needs, strict=True):
            flat, kept, c, divisor = _scale(z, layer)
            # Not a view of it, which nobody could write into.
            y = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])
            ys.append(y)
            again = need.magnitude and layer.bias is None
            final = torch.compiler.is_compiling() or y.is_inference()  # nothing overwrites it, or there is no backward
            ctx.watches.append(_Watch(y) if again and not final else None)
            saved += [
                layer.weight if needs_x or again else None,
                layer.a if needs_x or need.a else None,
                layer.b if needs_x or need.a or again else None,
                xa if need.b or again else None,
                kept if need.magnitude else None,
                c,
                divisor if need.magnitude else None,
            ]
        wants_x = any(need.weight or need.a for need in needs)
        again = any(watch is not None for watch in ctx.watches)
        ctx.dropout, ctx.scalings, ctx.leading = dropout, scalings, x.shape[:-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if wants_x or again else None, dropped if wants_x or needs_x else None, *saved)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        given, dropped, *rest = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], [_Layer(*part) for part in _parts(ctx.needs_input_grad[3:], 6)]
        x: Any = None if given is None else given.reshape(-1, given.shape[-1])
        ds: list[Tensor | None] = []
        own: list[tuple[Tensor | None, Tensor | None]] = []  # gradients of bias and magnitude
        adapted, xas = [], []
        parts = zip(_parts(rest, 7), needs, dys, ctx.scalings, ctx.watches, strict=True)
        for (weight, a, b, xa, kept, c, divisor), need, dy, scaling, watch in parts:
            adapted.append(Adapted(weight, None, a, b, scaling))
            xas.append(xa)
            if dy is None:
                ds.append(None)
                own.append((None, None))
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            d, dm = torch.empty_like(dy), None
            if need.magnitude:
                if watch is not None and watch.changed:
                    kept = F.linear(x, weight).addmm_(xa, b.t(), alpha=scaling / (1 - ctx.dropout)).mul_(c)
                dm = torch.mul(dy, kept, out=d).sum(0, dtype=divisor.dtype) / divisor
            ds.append(torch.mul(dy, c, out=d))
            own.append((dy.sum(0) if need.bias else None, dm))
        wanted = [Needs(need.weight, False, need.a, need.b) for need in needs]
        dx, grads = backward_of(ds, x, dropped, xas, ctx.dropout, adapted, needs_x, wanted)
        pairs = zip(grads, own, strict=True)
        flat = [each for (dw, _, da, db), (dbias, dm) in pairs for each in (dw, dbias, da, db, dm, None)]
        return dx if dx is None else dx.view(*ctx.leading, dx.shape[-1]), None, None, *flat


class _Layer(NamedTuple):
    """What the function takes for each layer: tensors, or whether their gradients are wanted."""

    weight: Any
    bias: Any
    a: Any
    b: Any
    magnitude: Any
    norm: Any

    def adapted(self, scaling: float) -> Adapted:
        """Without a bias, which is added after scaling."""
        return Adapted(self.weight, None, self.a, self.b, scaling)


def _parts(flat: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


_SMALLEST = {torch.float16: 2.0**-10, torch.float64: 2.0**-100}  # of c, so that y / c has the digits of z


def _scale(z: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = c ⊙ z + b``, what to keep, ``c`` and a divisor: ``dm = Σ dy ⊙ kept / divisor``. May overwrite ``z``."""
    c = ratio(layer.magnitude, layer.norm)
    norm = _as_stored(layer.norm, layer.magnitude)
    norm = torch.where(norm == 0, 1, norm)
    if layer.bias is not None:
        return torch.mul(z, c, out=torch.empty_like(z)).add_(layer.bias), z, c, norm
    smallest = _SMALLEST.get(z.dtype, 2.0**-40)
    c = torch.where(c.abs() < smallest, torch.copysign(torch.full_like(c, smallest), c), c)
    y = z.mul_(c)
    return y, y, c, norm * c


class _Watch:
    """Tells whether a tensor has been written into since, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._twin = tensor.detach()  # shares the count of changes, and goes on doing so without the data
        self._twin.data = tensor.new_empty(0)
        self._version = self._twin._version

    @property
    def changed(self) -> bool:
        """Whether it was."""
        return self._twin._version != self._version
