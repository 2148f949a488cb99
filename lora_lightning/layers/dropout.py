"""Dropout on the way to ``A``: which elements of an input are left out, held in as few bytes as can be.

Every element is left out with probability ``p``, independently of all others. On the CPU, where ``p`` is small, what is
drawn are the distances from one dropped element to the next (which are geometric), so that the work and the memory are
those of the dropped elements and not of all. On CUDA a seed is drawn, from which kernels work out anew what is dropped.
Elsewhere a mask of a byte an element says it. Each way the draw hangs on torch's generator for the device alone, so
that activation checkpointing repeats it.

Shapes: ``T`` tokens, ``in`` features; ``x`` is ``(T, in)``, ``dropped`` either places in its flattened form, ``(n,)``
int64, or a seed, ``(1,)`` int64, or a mask, ``(T, in)`` bool.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lora_lightning.layers.written import kernels_for

_FEW = 0.125  # a place takes 8 bytes, an element of a mask 1
_RARE = 1e-9  # so few that distances may not fit their numbers
_CACHED = 2**20  # so few elements lie in the caches of the cores that wrote them: all of these put zeros, not one alone
_MANY = 0.99  # so many that steps of 2⁻¹⁶ are coarse beside what is left


def draw(x: Tensor, p: float) -> Tensor:
    """Which elements of ``x``, ``(T, in)``, are dropped, each with probability ``p``."""
    if kernels_for(x) is not None and x.numel() < 2**31:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not _RARE <= p <= _MANY:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p)
    if p <= _FEW and type(x) is FakeTensor:  # nothing is drawn: as many places as there are on average
        return torch.empty(round(x.numel() * p), dtype=torch.int64)
    if p <= _FEW and type(x) is Tensor:
        return _places(x.numel(), p)
    # Four elements share one draw of 64 bits, so that p is a multiple of 2⁻¹⁶: several times as fast as bernoulli_.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[: x.numel()] < round(p * 2**16) - 2**15).view(x.shape)


def without(x: Tensor, dropped: Tensor, p: float) -> Tensor:
    """A copy of ``x``, ``(T, in)``, with zeros for what is dropped; what is kept is not scaled."""
    if dropped.dtype == torch.bool:
        return torch.where(dropped, 0, x)
    if (kernels := kernels_for(x)) is not None:
        return kernels.without(x.contiguous(), dropped, p)
    return without_(x.clone(memory_format=torch.contiguous_format), dropped, p)


def without_(x: Tensor, dropped: Tensor, p: float) -> Tensor:
    """The same in the memory of ``x``, where that can be; ``x`` is contiguous, and used up."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    if (kernels := kernels_for(x)) is not None:
        return kernels.without(x, dropped, p)
    flat = x.view(-1)
    if flat.numel() <= _CACHED:
        flat[dropped] = 0
    else:
        flat.index_fill_(0, dropped, 0)
    return x


def add_product(dx: Tensor, g: Tensor, a: Tensor, dropped: Tensor | None, p: float) -> None:
    """Add ``g A`` to ``dx``, ``(T, in)``, in place, but for what is dropped; ``g`` is ``(T, r)``, ``a`` ``(r, in)``."""
    if dropped is None:
        dx.addmm_(g, a)
    elif dropped.dtype == torch.bool:
        dx.add_(torch.where(dropped, 0, g @ a))
    elif (kernels := kernels_for(dx)) is not None:
        kernels.add_product(dx, g.contiguous(), a.contiguous(), dropped, p)
    else:
        flat = dx.view(-1)
        before = flat[dropped]
        dx.addmm_(g, a)
        flat[dropped] = before


def _places(n: int, p: float) -> Tensor:
    """Increasing places among ``n``, each there with probability ``p``."""
    random = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))
    found: list[np.ndarray] = []
    last = -1
    while last < n:
        expected = (n - last) * p
        places = _gaps(random, int(expected + 6 * math.sqrt(expected)) + 8, p)
        places[0] += last
        found.append(np.cumsum(places, out=places))
        last = int(places[-1])
    places = found[0] if len(found) == 1 else np.concatenate(found)
    return torch.from_numpy(places[: np.searchsorted(places, n)])


def _gaps(random: np.random.SFC64, count: int, p: float) -> np.ndarray:
    """Numbers of trials, each with probability ``p``, up to and with the first that succeeds: int64.

    ``1 + ⌊ln u / ln(1-p)⌋`` for ``u`` even between 0 and 1, in steps of 2⁻²⁴.
    """
    steps = random.random_raw((count + 1) // 2).view(np.uint32)[:count] >> 8
    steps += 1
    logs = np.log(steps.astype(np.float32))
    logs -= 24 * math.log(2)
    logs /= math.log1p(-p)
    gaps = logs.astype(np.int64)
    gaps += 1
    return gaps
