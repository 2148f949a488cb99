"""The mathematics of a low-rank update, as pure functions of tensors.

Shapes: ``T`` tokens (all leading dimensions of an input taken together), ``in``/``out`` the sides of the weight, ``r``
the rank, ``R`` the ranks of all layers on one input taken together. Source of the update: LoRA, arXiv 2106.09685,
section 4.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from lora_lightning.layers.dropout import add_product, draw, without

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


class Adapted(NamedTuple):
    """The tensors of one adapted linear layer."""

    weight: Tensor
    """``(out, in)``."""
    bias: Tensor | None
    """``(out,)``."""
    a: Tensor
    """``(r, in)``."""
    b: Tensor
    """``(out, r)``."""
    scaling: float
    """The scale ``s``."""


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ``.

    Everything is computed in the dtype of ``x`` (autocast's where it is on); gradients arrive in the parameters' own.

    Args:
        x: Input, ``(..., in)``.
        weight: Base weight, ``(out, in)``.
        bias: Base bias, ``(out,)``, or None.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        scaling: The scale ``s``.
        dropout: Probability of dropping an element of ``x`` on its way to ``A``; 0 outside training.

    Returns:
        ``(..., out)``.
    """
    return lora_linears(x, [Adapted(weight, bias, lora_a, lora_b, scaling)], dropout)[0]


def lora_linears(x: Tensor, layers: Sequence[Adapted], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """What several adapted layers make of one input, which is kept once and multiplied by their ``A`` at once.

    They share one draw of the dropout.

    Args:
        x: Input, ``(..., in)``.
        layers: The layers' tensors.
        dropout: Probability of dropping an element of ``x`` on its way to the ``A``; 0 outside training.

    Returns:
        ``(..., out)`` for each layer.
    """
    x, layers = in_one_dtype(x, layers)
    if written_out(x, layers):
        tensors = [tensor for layer in layers for tensor in layer[:4]]
        return _LoraLinears.apply(x, dropout, tuple(layer.scaling for layer in layers), *tensors)
    # Tensor subclasses (DTensor, quantised weights) and torch.func bring operations of their own: composed, each works.
    return tuple(
        F.linear(x, layer.weight, layer.bias) + low_rank(x, layer.a, layer.b, layer.scaling, dropout)
        for layer in layers
    )


def low_rank(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The update alone, ``s · (drop(x) Aᵀ) Bᵀ``: ``(..., in) -> (..., out)``."""
    return F.linear(F.linear(F.dropout(x, dropout), lora_a), lora_b) * scaling


def in_one_dtype(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, Sequence[Adapted]]:
    """Input and layers in the dtype of the arithmetic: autocast's where it is on, else the input's for the adapters."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        layers = [layer._replace(weight=layer.weight.to(dtype), bias=_to(layer.bias, dtype)) for layer in layers]
    dtype = x.dtype
    if all(layer.a.dtype == dtype == layer.b.dtype for layer in layers):
        return x, layers
    return x, [layer._replace(a=layer.a.to(dtype), b=layer.b.to(dtype)) for layer in layers]


def as_forward(backward: _Backward) -> _Backward:
    """A backward in the dtypes of its forward, also where it is called under autocast and forward was not."""

    @functools.wraps(backward)
    def outside(ctx: Any, *dys: Tensor | None) -> Any:
        kind = next((dy.device.type for dy in dys if dy is not None), "cpu")
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, *dys)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *dys)

    return cast("_Backward", outside)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def shaped(out: Tensor, x: Tensor) -> Tensor:
    """``(T, out)`` with the leading dimensions of ``x``, as a tensor of its own: nobody could write into a view."""
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


def written_out(x: Tensor, layers: Sequence[Adapted]) -> bool:
    """Whether all are plain tensors, for which gradients are written out here."""
    return (
        type(x) in PLAIN
        and all(type(tensor) in PLAIN for layer in layers for tensor in (layer.weight, layer.a, layer.b))
        and not transformed()
    )


def transformed() -> bool:
    """Whether something is at work that wants operations it knows, and none that write into what others gave.

    ``torch.func`` (``grad``, ``vmap``, ``jvp`` …) does, and so does selective activation checkpointing, which keeps
    the outputs of some.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, _SELECTING) for mode in _get_current_dispatch_mode_stack())


_SELECTING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""Tensors without operations of their own. Fake ones, which have a shape and no numbers, stand for such."""


def forward_of(
    x: Tensor, dropout: float, layers: Sequence[Adapted]
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
    """``y = x Wᵀ + b + s/(1-p) · (kept(x) Aᵀ) Bᵀ`` of each layer.

    Args:
        x: ``(T, in)``.
        dropout: The probability ``p``.
        layers: Tensors of one dtype.

    Returns:
        Outputs, ``(T, out)`` each; what was dropped; and ``kept(x) Aᵀ`` of each layer, ``(T, r)`` each, unscaled.
    """
    dropped = draw(x, dropout) if dropout else None
    outs, xa = outputs_of(x, x if dropped is None else without(x, dropped, dropout), dropout, layers)
    return outs, dropped, xa


def outputs_of(
    x: Tensor, kept: Tensor, dropout: float, layers: Sequence[Adapted]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs and ``kept(x) Aᵀ`` of :func:`forward_of`, for what is kept of ``x``."""
    xa = (kept @ _side_by_side(layers).t()).split([len(layer.a) for layer in layers], dim=1)
    outs = []
    for layer, part in zip(layers, xa, strict=True):
        scale = layer.scaling / (1 - dropout)
        if _is_wide(x, layer.weight.shape[0]) and layer.bias is None:
            outs.append(_scaled(part, layer.b.t(), scale).addmm_(x, layer.weight.t()))
        else:
            outs.append(F.linear(x, layer.weight, layer.bias).addmm_(part, layer.b.t(), alpha=scale))
    return outs, xa


def _is_wide(x: Tensor, width: int) -> bool:
    """Whether adding to a product of that width costs more than beginning with what would be added (on GPUs)."""
    return x.is_cuda and width >= 4096


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale · left right``, without a pass of its own for the scale."""
    return left @ right if scale == 1 else torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class Needs(NamedTuple):
    """Which gradients of one layer are wanted."""

    weight: bool
    bias: bool
    a: bool
    b: bool


def backward_of(
    dys: Sequence[Tensor | None],
    x: Any,
    dropped: Tensor | None,
    xa: Sequence[Tensor],
    dropout: float,
    layers: Sequence[Adapted],
    needs_x: bool,
    needs: Sequence[Needs],
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """Gradients of :func:`forward_of`.

    With ``k = s/(1-p)`` and ``g = k · dy B``: ``dA = gᵀ kept(x)``, ``dB = k · dyᵀ (kept(x) Aᵀ)``,
    ``dx = dy W + kept'(g A)``.

    Args:
        dys: ``(T, out)`` each; None where a layer's output was not used.
        x: ``(T, in)``; may be None where no weight and no ``A`` wants a gradient.
        dropped: As it was drawn.
        xa: ``kept(x) Aᵀ`` of each layer, ``(T, r)``.
        dropout: The probability ``p``.
        layers: As forward.
        needs_x: Whether ``dx`` is wanted.
        needs: What else is wanted, for each layer.

    Returns:
        ``dx``, ``(T, in)``, and for each layer the gradients of weight, bias, ``A`` and ``B``.
    """
    used = [place for place, dy in enumerate(dys) if dy is not None]
    if not used:
        return None, [(None,) * 4 for _ in layers]
    wants_a = any(needs[place].a for place in used)
    g = dx = kept = None
    if needs_x or wants_a:
        gs = [into_rank(dys[place], layers[place], dropout) for place in used]  # type: ignore[arg-type]
        g = gs[0] if len(gs) == 1 else torch.cat(gs, dim=1)  # (T, R)
    if needs_x and g is not None:
        a = _side_by_side([layers[place] for place in used])
        first = dropped is None and _is_wide(g, a.shape[1])
        dx = g @ a if first else None
        for place in used:
            dy, weight = dys[place], layers[place].weight
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)  # type: ignore[operator,arg-type]
        if dx is not None and not first:
            add_product(dx, g, a, dropped, dropout)
    if wants_a:
        kept = x if dropped is None else without(x, dropped, dropout)
    return dx, gradients_of(dys, x, kept, g, xa, dropout, layers, needs)


def into_rank(dy: Tensor, layer: Adapted, dropout: float) -> Tensor:
    """``g = s/(1-p) · dy B``: ``(T, out) -> (T, r)``."""
    return _scaled(dy, layer.b, layer.scaling / (1 - dropout))


def gradients_of(
    dys: Sequence[Tensor | None],
    x: Any,
    kept: Tensor | None,
    g: Tensor | None,
    xa: Sequence[Tensor],
    dropout: float,
    layers: Sequence[Adapted],
    needs: Sequence[Needs],
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of weight, bias, ``A`` and ``B`` of each layer, for ``g``, ``(T, R)``, of those that were used."""
    used = [place for place, dy in enumerate(dys) if dy is not None]
    das: dict[int, Tensor] = {}
    if kept is not None and g is not None:
        da = g.t() @ kept  # (R, in)
        das = dict(zip(used, da.split([len(layers[place].a) for place in used]), strict=True))
    grads: list[tuple[Tensor | None, ...]] = [(None,) * 4 for _ in layers]
    for place in used:
        dy, layer, need = dys[place], layers[place], needs[place]
        assert dy is not None
        grads[place] = (
            dy.t() @ x if need.weight else None,
            dy.sum(0) if need.bias else None,
            das[place] if need.a else None,
            # (r, T) @ (T, out) runs row-major over the long side: 2 to 4 times faster than its transpose at small r.
            _scaled(xa[place].t(), dy, layer.scaling / (1 - dropout)).t() if need.b else None,
        )
    return grads


def _side_by_side(layers: Sequence[Adapted]) -> Tensor:
    """``(R, in)``."""
    return layers[0].a if len(layers) == 1 else torch.cat([layer.a for layer in layers])


def saved(layers: Sequence[Adapted], needs_x: bool, needs: Sequence[Needs]) -> list[Tensor | None]:
    """What backward will look at: four places a layer; a frozen weight is needed for ``dx`` only, a bias not at all."""
    wants_a = any(need.a for need in needs)
    return [
        tensor
        for layer in layers
        for tensor in (
            layer.weight if needs_x else None,
            None,
            layer.a if needs_x or wants_a else None,
            layer.b if needs_x or wants_a else None,
        )
    ]


def grouped(tensors: Sequence[Any], scalings: Sequence[float]) -> list[Adapted]:
    """Layers again, from a flat list of weight, bias, ``A`` and ``B`` of each."""
    parts = (tensors[4 * place : 4 * place + 4] for place in range(len(scalings)))
    return [Adapted(weight, bias, a, b, scaling) for (weight, bias, a, b), scaling in zip(parts, scalings, strict=True)]


def needs_of(wanted: Sequence[bool]) -> list[Needs]:
    """What is wanted of each layer, from the flat list that autograd gives."""
    return [Needs(*wanted[place : place + 4]) for place in range(0, len(wanted), 4)]


class _LoraLinears(torch.autograd.Function):
    """Adapted linear layers on one input. It is saved once, and its dropped-out copy is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = grouped(tensors, scalings)
        x_flat = x.reshape(-1, x.shape[-1])  # (T, in)
        outs, dropped, xa = forward_of(x_flat, dropout, layers)
        needs_x, needs = ctx.needs_input_grad[0], needs_of(ctx.needs_input_grad[3:])
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.scalings, ctx.leading = dropout, scalings, x.shape[:-1]
        wants_x = any(need.weight or need.a for need in needs)
        ctx.save_for_backward(
            x if wants_x else None,
            dropped if wants_x or needs_x else None,
            *(part if need.b else None for part, need in zip(xa, needs, strict=True)),
            *saved(layers, needs_x, needs),
        )
        return tuple(shaped(out, x) for out in outs)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, dropped, *rest = ctx.saved_tensors
        count = len(ctx.scalings)
        layers = grouped(rest[count:], ctx.scalings)
        dx, grads = backward_of(
            [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys],
            x if x is None else x.reshape(-1, x.shape[-1]),
            dropped,
            rest[:count],
            ctx.dropout,
            layers,
            ctx.needs_input_grad[0],
            needs_of(ctx.needs_input_grad[3:]),
        )
        return (
            dx if dx is None else dx.view(*ctx.leading, dx.shape[-1]),
            None,
            None,
            *(grad for layer in grads for grad in layer),
        )
