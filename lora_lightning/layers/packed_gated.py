"""Gated feed-forward blocks of a packed model, ``down(act(gate(x)) · up(x))``, as one step of autograd.

The same as :mod:`lora_lightning.layers.gated` with an adapter for each slot: gate and up are kept for backward, their
product is made again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_lightning.layers.functional import as_forward, shaped
from lora_lightning.layers.gated import Activation, activation_of
from lora_lightning.layers.packed import PackedLoraLinear
from lora_lightning.layers.packed_functional import (
    Needs,
    add_product,
    backward_of,
    forward_of,
    gradient_of_a,
    gradients_of_b,
    grouped,
    in_one_dtype,
    into_rank,
    outputs_of,
)


class PackedGated(nn.Module):
    """A gated feed-forward block whose three layers are packed.

    Attributes:
        gate_proj: ``(..., d) -> (..., f)``.
        up_proj: ``(..., d) -> (..., f)``.
        down_proj: ``(..., f) -> (..., d)``.
        act_fn: The activation.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(n·rows, T, d) -> (n·rows, T, d)``."""
        gate, up, down = cast("tuple[PackedLoraLinear, ...]", (self.gate_proj, self.up_proj, self.down_proj))
        activation = activation_of(cast("nn.Module", self.act_fn))
        if activation is None or kwargs or len(args) != 1 or gate.lora_stack is not up.lora_stack:
            return super().forward(*args, **kwargs)
        (x,) = args
        gate.lora_stack.seating.check(x)
        a, scales, (gate_packed, up_packed) = gate.lora_stack.chosen((gate, up))
        x, a, first = in_one_dtype(x, a, (gate_packed, up_packed))
        a_down, scales_down, down_packed = down.lora_stack.chosen((down,))
        _, a_down, last = in_one_dtype(x, a_down, down_packed)
        # As the layers would draw: what goes into gate and up, then what goes into down.
        dropped, dropped_h = gate.lora_stack.draw(x), down.lora_stack.draw(x)
        scales, scales_down = scales.to(x.dtype), scales_down.to(x.dtype)
        tensors = [tensor for layer in (*first, *last) for tensor in layer]
        return _PackedGated.apply(x, dropped, dropped_h, activation, scales, scales_down, a, a_down, *tensors)


class _PackedGated(torch.autograd.Function):
    """Shapes: ``x`` and ``y`` ``(n·M, d)``; ``gate``, ``up`` and their product ``h`` ``(n·M, f)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        dropped_h: Tensor | None,
        activation: Activation,
        scales: Tensor,
        scales_down: Tensor,
        a: Tensor,
        a_down: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        layers = grouped(tensors)
        x_flat = x.reshape(-1, x.shape[-1])
        (gate, up), u = forward_of(x_flat, dropped, scales, a, layers[:2])
        h, kept = activation.product(gate, up, dropped_h, 0.0)
        (y,), u_down = outputs_of(h, kept, scales_down, a_down, layers[2:])
        ctx.activation, ctx.leading = activation, x.shape[:-1]
        ctx.save_for_backward(x, gate, up, dropped, dropped_h, u, u_down, scales, scales_down, a, a_down, *tensors)
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, up, dropped, dropped_h, u, u_down, scales, scales_down, a, a_down, *tensors = ctx.saved_tensors
        layers, activation = grouped(tensors), ctx.activation
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[0], wanted[6], (wanted[10], wanted[13]))
        needs_down = Needs(True, wanted[7], (wanted[16],))
        dy_flat = dy.reshape(-1, dy.shape[-1])
        g = into_rank([dy_flat], scales_down, a_down, layers[2:])
        da_down = acted = None
        if needs_down.a:
            kept, acted = activation.kept_product(gate, up, dropped_h, 0.0)
            da_down = gradient_of_a(g, kept)
            del kept
        (db_down,) = gradients_of_b([dy_flat], u_down, layers[2:], needs_down)
        dh = dy_flat @ layers[2].weight
        add_product(dh, g, a_down, dropped_h)
        dup = (activation.forward(gate) if acted is None else acted).mul_(dh)
        dgate = activation.backward(dh.mul_(up), gate)
        del dh, acted
        x_flat = x.reshape(-1, x.shape[-1])
        dx, da, (db_gate, db_up) = backward_of([dgate, dup], x_flat, dropped, u, scales, a, layers[:2], needs)
        dx = None if dx is None else dx.view(*ctx.leading, dx.shape[-1])
        grads = (None, None, db_gate, None, None, db_up, None, None, db_down)
        return dx, None, None, None, None, None, da, da_down, *grads
