"""Starts from the weight itself: PiSSA, OLoRA and MiCA. Each is a function of the weight, ``(out, in)``."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

Start = tuple[Tensor, Tensor]
"""``A (r, in)`` and ``B (out, r)``."""


def pissa(weight: Tensor, r: int, scaling: float, iterations: int | None, generator: Generator) -> Start:
    """The ``r`` largest singular values and vectors, shared between both: ``s · B A = U_r S_r V_rᵀ``.

    Source: PiSSA, arXiv 2404.02948.

    Args:
        weight: ``(out, in)``.
        r: Rank.
        scaling: The scale ``s``.
        iterations: Of a fast randomised decomposition; None is the exact one.
        generator: For the fast one's draws.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = svd_lowrank(weight, r, iterations, seed_from(generator))
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def olora(weight: Tensor, r: int) -> Start:
    """The first ``r`` columns of ``Q`` and rows of ``R`` of a QR decomposition. Source: OLoRA, arXiv 2406.01775."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def mica(weight: Tensor, r: int) -> Start:
    """``B`` the left singular vectors of the ``r`` smallest singular values, ``A`` zero. Source: arXiv 2604.01694."""
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:]


def seed_from(generator: Generator) -> int:
    """A seed for what takes no generator."""
    return int(torch.randint(0, 2**62, (), generator=generator, device=generator.device))


def svd_lowrank(matrix: Tensor, q: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``q`` largest singular values and vectors ``U, S, Vᵀ``, by a randomised subspace iteration.

    Exact where ``q`` is all there are. ``torch.svd_lowrank`` with draws of its own. Source: arXiv 0909.4061.
    """
    if q >= min(matrix.shape):
        return torch.linalg.svd(matrix, full_matrices=False)
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=q, niter=iterations)
    return u, s, v.mH
