"""What a model does to its logits, from what becomes of known numbers in their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lightning.layers.row_losses import Form


def probe(vocabulary: int, device: torch.device) -> Tensor:
    """Numbers of all sizes from 0.01 to 1000, no two alike, signs alternating, and half of each: (1, 2, V).

    In float64, where the device has it, so that factors are found to the last digit whatever the model's dtype.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sizes_V = torch.logspace(3, -2, vocabulary, dtype=dtype, device=device)
    sizes_V[1::2] *= -1
    return torch.stack([sizes_V, sizes_V / 2])[None]


def form_of(sent: Tensor, came: object, guess: Form) -> Form | None:
    """Which `Form` makes one tensor of the other, in every element; None if there is none.

    Args:
        sent: A `probe`.
        came: What became of it, maybe in another dtype.
        guess: What is returned if it fits.
    """
    if not isinstance(came, Tensor) or came.shape != sent.shape or not came.is_floating_point():
        return None
    digits = torch.finfo(came.dtype).eps
    half = digits > 1e-6
    tolerance = digits if half else digits**0.75  # tanh and its inverse lose some digits
    sent, came = sent.detach(), came.detach().to(sent.dtype)
    if _fits(guess, sent, came, tolerance):
        return guess
    if half or not came.isfinite().all():  # no factor can be read exactly from numbers of half precision
        return None
    smallest = sent[0, 1].abs().argmin()
    scale = float(came[0, 1, smallest] / sent[0, 1, smallest])
    linear = Form(_tidy(scale))
    if _fits(linear, sent, came, tolerance):
        return linear
    # tanh 2u = 2 tanh u / (1 + tanh² u), so that f(z) and f(2z) give tanh u, and with it c and s; where it is bent
    # about half as far as can be, they give it best.
    squares_V = 2 * came[0, 1] / came[0, 0] - 1
    at = int((squares_V - 0.3).abs().nan_to_num(nan=math.inf).argmin())
    if not 0 < (square := float(squares_V[at])) < 1:
        return None
    cap = abs(float(came[0, 1, at])) / math.sqrt(square)
    scale = math.copysign(cap * math.atanh(math.sqrt(square)), scale) / abs(float(sent[0, 1, at]))
    capped = Form(_tidy(scale), _tidy(cap))
    return capped if _fits(capped, sent, came, tolerance) else None


def _fits(form: Form, sent: Tensor, came: Tensor, tolerance: float) -> bool:
    return torch.allclose(form.of(sent), came, rtol=tolerance, atol=0)


def _tidy(number: float) -> float:
    """Without the last digits, in which arithmetic has left its traces: 1 rather than 1.0000000000000002."""
    return float(f"{number:.13g}")
