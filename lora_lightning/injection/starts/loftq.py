"""LoftQ: the base's weight is rounded as a quantised one would be, and the adapter begins with what that has lost.

``min ‖W − Q − s · B A‖`` by turns: ``Q`` is the rounded ``W − s · B A``, ``s · B A`` the best of rank r for ``W − Q``.
Source: LoftQ, arXiv 2310.08659. PEFT leaves ``s`` out of it, so that there the layer begins with ``Q + s · B A`` for a
``B A`` that fits ``W − Q`` by itself; with ``s`` = 1 both are one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def loftq(weight: Tensor, r: int, scaling: float, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded weight ``Q`` in the weight's dtype and shape, ``A (r, in)`` and ``B (out, r)``.

    Args:
        weight: ``(out, in)``.
        r: Rank.
        scaling: The scale ``s``.
        bits: 4 rounds to NF4 in blocks of 64, 8 to whole numbers in each row, as bitsandbytes does both.
        iterations: How many turns.
    """
    rounded = nf4 if bits == 4 else int8
    left = weight
    for _ in range(iterations):
        quantised = rounded(left)
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        root = s[:r].sqrt()
        b, a = u[:, :r] * root, root[:, None] * vh[:r]
        left = weight - b @ a
    share = abs(scaling) ** 0.5
    return quantised, a / share * (1 if scaling > 0 else -1), b / share


def nf4(weight: Tensor) -> Tensor:
    """A weight as NF4 keeps it: each block of 64 values scaled by its largest, and rounded to one of 16."""
    flat = weight.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = padded.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(_NF4, dtype=weight.dtype, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(padded / torch.where(largest > 0, largest, 1), between)
    return (levels[index] * largest).view(-1)[: len(flat)].view_as(weight)


def int8(weight: Tensor) -> Tensor:
    """A weight as whole numbers from -127 to 127 keep it, scaled by the largest value of each row."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / torch.where(step > 0, step, 1)).round() * step
