"""Gated feed-forward blocks, ``down(act(gate(x)) · up(x))``, whose three layers are adapted: one step of autograd.

Of the three wide tensors in between (gate, up and their product) two are kept for backward and the third is made again,
where composed operations keep four.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from lora_lightning.layers.dropout import add_product, draw, without, without_
from lora_lightning.layers.functional import (
    PLAIN,
    as_forward,
    backward_of,
    forward_of,
    gradients_of,
    grouped,
    in_one_dtype,
    into_rank,
    needs_of,
    outputs_of,
    saved,
    shaped,
)
from lora_lightning.layers.group import at_once
from lora_lightning.layers.linear import LoraLinear
from lora_lightning.layers.made import replaced
from lora_lightning.layers.written import kernels_for

FORMULA = "def forward(self, x): return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What the forward of a class says to which :class:`LoraGated` may be put over."""


class LoraGated(nn.Module):
    """A gated feed-forward block as one function, where nobody looks at what is in between; else as its class has it.

    Attributes:
        gate_proj: ``(..., d) -> (..., f)``.
        up_proj: ``(..., d) -> (..., f)``.
        down_proj: ``(..., f) -> (..., d)``.
        act_fn: The activation.
        lora_read: The forward of the class that was read.
    """

    lora_read: Callable

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., d) -> (..., d)``."""
        layers = cast("tuple[LoraLinear, ...]", (self.gate_proj, self.up_proj, self.down_proj))
        activation = activation_of(cast("nn.Module", self.act_fn))
        plain = not kwargs and len(args) == 1 and type(args[0]) in PLAIN
        theirs = super().forward
        if activation is None or not plain or not _unobserved(self, layers) or replaced(theirs, self.lora_read):
            return theirs(*args, **kwargs)
        x, adapted = in_one_dtype(args[0], [layer.lora_tensors for layer in layers])
        tensors = [tensor for layer in adapted for tensor in layer[:4]]
        scalings = tuple(layer.scaling for layer in adapted)
        return _Gated.apply(x, layers[0]._active_dropout, activation, scalings, *tensors)


_CALL = nn.Module.__call__


def _unobserved(block: nn.Module, layers: tuple[LoraLinear, ...]) -> bool:
    act = cast("nn.Module", block.act_fn)
    return (
        all(type(layer).forward is LoraLinear.forward and not layer._forward_hooks for layer in layers)
        and "forward" not in vars(act)
        and not (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)
        and not _has_any_global_hook()
        and nn.Module.__call__ is _CALL  # some tools watch all calls so
        and at_once(layers)
    )


class Activation(NamedTuple):
    """An activation ``a(x)``, and ``dx`` of ``(dy, x)`` in the place of ``dy``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def product(self, gate: Tensor, up: Tensor, dropped: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        """``h = a(gate) · up``, ``(T, f)``, and what dropout keeps of it."""
        if (kernels := self._kernels(gate, dropped)) is not None:
            return kernels.swiglu(gate, up, dropped, p, whole=True)
        h = self.forward(gate).mul_(up)
        return h, h if dropped is None else without(h, dropped, p)

    def kept_product(self, gate: Tensor, up: Tensor, dropped: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
        """What dropout keeps of ``h``, ``(T, f)``, and ``a(gate)``, if it was made on the way."""
        if (kernels := self._kernels(gate, dropped)) is not None:
            return kernels.swiglu(gate, up, dropped, p, whole=False)[1], None
        acted = self.forward(gate)
        h = acted * up
        return h if dropped is None else without_(h, dropped, p), acted

    def product_backward(
        self,
        dh: Tensor,
        gate: Tensor,
        up: Tensor,
        acted: Tensor | None,
        g: Tensor,
        a: Tensor,
        dropped: Tensor | None,
        p: float,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``gate`` and ``up``, ``(T, f)``, for ``dh + kept'(g A)``; ``dh`` and ``acted`` are used up."""
        if (kernels := self._kernels(gate, dropped)) is not None:
            return kernels.swiglu_backward(dh, gate, up, g, a.contiguous(), dropped, p)
        add_product(dh, g, a, dropped, p)
        dup = (self.forward(gate) if acted is None else acted).mul_(dh)
        return self.backward(dh.mul_(up), gate), dup

    def _kernels(self, gate: Tensor, dropped: Tensor | None) -> ModuleType | None:
        """Kernels for CUDA, which take a seed of the dropout and no mask."""
        seeded = dropped is None or dropped.dtype != torch.bool
        return kernels_for(gate) if self is _SILU and seeded else None


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=dy)


def _gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=approximate, grad_input=dy)


def _gelu(approximate: str) -> Activation:
    return Activation(
        functools.partial(F.gelu, approximate=approximate),
        functools.partial(_gelu_backward, approximate=approximate),
    )


_SILU = Activation(F.silu, _silu_backward)
_GELU = {approximate: _gelu(approximate) for approximate in ("none", "tanh")}


def activation_of(module: nn.Module | None) -> Activation | None:
    """The function that an activation module of torch or transformers is; None where it is not known."""
    kind = type(module)
    theirs = sys.modules.get("transformers.activations")
    if kind is nn.SiLU or kind is getattr(theirs, "SiLUActivation", None):
        return _SILU
    if kind is nn.GELU:
        return _GELU[cast("nn.GELU", module).approximate]
    if kind in (getattr(theirs, "GELUTanh", None), getattr(theirs, "PytorchGELUTanh", None)):
        act = getattr(module, "act", None)
        if isinstance(act, functools.partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}:
            return _GELU["tanh"]
    return None


class _Gated(torch.autograd.Function):
    """Shapes: ``x`` and ``y`` ``(T, d)``; ``gate``, ``up`` and their product ``h`` ``(T, f)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropout: float,
        activation: Activation,
        scalings: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        layers = grouped(tensors, scalings)
        x_flat = x.reshape(-1, x.shape[-1])
        (gate, up), dropped, xa = forward_of(x_flat, dropout, layers[:2])
        dropped_h = draw(gate, dropout) if dropout else None
        h, kept = activation.product(gate, up, dropped_h, dropout)
        (y,), ha = outputs_of(h, kept, dropout, layers[2:])
        ctx.dropout, ctx.activation, ctx.scalings, ctx.leading = dropout, activation, scalings, x.shape[:-1]
        needs = needs_of(ctx.needs_input_grad[4:])
        wants_x = any(need.weight or need.a for need in needs[:2])  # LoRA-FA freezes A
        ctx.save_for_backward(
            x if wants_x else None, gate, up, dropped, dropped_h, *xa, *ha, *saved(layers, True, needs)
        )
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, up, dropped, dropped_h, *rest = ctx.saved_tensors
        xa, layers = rest[:3], grouped(rest[3:], ctx.scalings)
        needs, down, p = needs_of(ctx.needs_input_grad[4:]), layers[2], ctx.dropout
        dy_flat = dy.reshape(-1, dy.shape[-1])
        g = into_rank(dy_flat, down, p)
        h = kept = acted = None
        if needs[2].weight:
            h, kept = ctx.activation.product(gate, up, dropped_h, p)
        elif needs[2].a:
            kept, acted = ctx.activation.kept_product(gate, up, dropped_h, p)
        down_grads = gradients_of([dy_flat], h, kept, g, xa[2:], p, layers[2:], needs[2:])
        del h, kept
        dh = dy_flat @ down.weight
        dgate, dup = ctx.activation.product_backward(dh, gate, up, acted, g, down.a, dropped_h, p)
        del dh, acted
        x_flat = x if x is None else x.reshape(-1, x.shape[-1])
        dx, grads = backward_of(
            [dgate, dup], x_flat, dropped, xa[:2], p, layers[:2], ctx.needs_input_grad[0], needs[:2]
        )
        return (
            dx if dx is None else dx.view(*ctx.leading, dx.shape[-1]),
            None,
            None,
            None,
            *(grad for layer in (*grads, *down_grads) for grad in layer),
        )
