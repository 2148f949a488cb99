"""What is written out for CUDA in Triton: work on single elements and rows that would otherwise pass memory many times.

Each function does what the composed operations in its caller do, to a rounding. Imported only where :func:`usable` says
so: Triton comes with torch's builds for CUDA and ROCm.

Shapes: ``T`` tokens, ``d`` and ``f`` features, ``r`` rank.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _is_kept(at, seed, p):
    """A hash of the place and the seed (32 bits, two rounds of multiply and shift) against the probability."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    h = at.to(tl.uint32) ^ low
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h ^= high
    h *= 0x846CA68B
    h ^= h >> 16
    h *= 0x9E3779B1
    h ^= h >> 15
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p  # 24 bits, over 2²⁴


@triton.jit
def _swiglu(gate, up, out, kept, seed, n, p, WRITES_OUT: tl.constexpr, WRITES_KEPT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    acted = (g * tl.sigmoid(g)).to(gate.dtype.element_ty).to(tl.float32)  # rounded where the composed one rounds
    value = (acted * u).to(gate.dtype.element_ty)
    if WRITES_OUT:
        tl.store(out + at, value, mask=inside)
    if WRITES_KEPT:
        tl.store(kept + at, tl.where(_is_kept(at, tl.load(seed), p), value, 0), mask=inside)


@triton.jit
def _swiglu_backward(
    dh, gate, up, dup, g, a, seed, T, f, r, p,
    DROPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    low = _product(g, a, t, c, T, f, r, BLOCK_T, BLOCK_F, BLOCK_R)
    at = t[:, None].to(tl.int64) * f + c[None, :]
    inside = (t[:, None] < T) & (c[None, :] < f)
    if DROPS:
        low = tl.where(_is_kept(at, tl.load(seed), p), low, 0)
    d = tl.load(dh + at, mask=inside).to(tl.float32) + low
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(x)
    tl.store(dup + at, (d * x * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dh + at, (d * u * s * (1 + x * (1 - s))).to(dh.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    g, a, t, c, T, d, r, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """A block of ``g A``, in float32."""
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, r, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        left = tl.load(g + t[:, None].to(tl.int64) * r + k[None, :], mask=(t[:, None] < T) & (k[None, :] < r), other=0)
        right = tl.load(a + k[:, None].to(tl.int64) * d + c[None, :], mask=(k[:, None] < r) & (c[None, :] < d), other=0)
        total += tl.dot(left, right, input_precision="ieee")
    return total


@triton.jit
def _norm(x, weight, y, rho, d, epsilon, ROUNDS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    value = tl.load(x + row * d + at, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / d + epsilon)
    normal = value * scale
    if not ROUNDS_LAST:
        normal = normal.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * d + at, (normal * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rho + row, scale)


@triton.jit
def _norm_backward(dy, x, weight, rho, dx, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    value = tl.load(x + row * d + at, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    wdy = tl.load(dy + row * d + at, mask=inside, other=0).to(tl.float32) * w
    scale = tl.load(rho + row)
    along = tl.sum(wdy * value) * scale * scale / d
    tl.store(dx + row * d + at, (scale * (wdy - value * along)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, y, rows, H, T, half,
    x_b, x_h, x_t, y_b, y_h, y_t, c_b, c_h, c_t,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, t, b = row % H, (row // H) % T, row // (H * T)
    c = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (c[None, :] < half)
    at = (b * x_b + h * x_h + t * x_t)[:, None] + c[None, :]
    angle = (b * c_b + h * c_h + t * c_t)[:, None] + c[None, :]
    kind = y.dtype.element_ty
    x1 = tl.load(x + at, mask=inside).to(tl.float32)
    x2 = tl.load(x + at + half, mask=inside).to(tl.float32)
    c1 = tl.load(cos + angle, mask=inside).to(tl.float32)
    c2 = tl.load(cos + angle + half, mask=inside).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside).to(tl.float32)
    s2 = tl.load(sin + angle + half, mask=inside).to(tl.float32)
    straight1, straight2 = (x1 * c1).to(kind).to(tl.float32), (x2 * c2).to(kind).to(tl.float32)
    if BACKWARD:
        y1, y2 = straight1 + (x2 * s2).to(kind).to(tl.float32), straight2 - (x1 * s1).to(kind).to(tl.float32)
    else:
        y1, y2 = straight1 - (x2 * s1).to(kind).to(tl.float32), straight2 + (x1 * s2).to(kind).to(tl.float32)
    out = (b * y_b + h * y_h + t * y_t)[:, None] + c[None, :]
    tl.store(y + out, y1.to(kind), mask=inside)
    tl.store(y + out + half, y2.to(kind), mask=inside)


@triton.jit
def _without(x, out, seed, n, p, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside)
    tl.store(out + at, tl.where(_is_kept(at, tl.load(seed), p), value, 0), mask=inside)


@triton.jit
def _add_product(
    dx, g, a, seed, T, d, r, p, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _product(g, a, t, c, T, d, r, BLOCK_T, BLOCK_D, BLOCK_R)
    at = t[:, None].to(tl.int64) * d + c[None, :]
    inside = (t[:, None] < T) & (c[None, :] < d)
    before = tl.load(dx + at, mask=inside, other=0).to(tl.float32)
    total = tl.where(_is_kept(at, tl.load(seed), p), total, 0)
    tl.store(dx + at, (before + total).to(dx.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, seed: Tensor | None, p: float, *, whole: bool) -> tuple[Tensor, Tensor]:
    """``h = silu(gate) · up``, all ``(T, f)`` and contiguous, and what :func:`without` would keep of it.

    Not ``whole``, only what is kept is written, and both are that.
    """
    out = torch.empty_like(gate)
    drops = seed is not None
    kept = torch.empty_like(gate) if drops and whole else out
    n = gate.numel()
    with _on(gate):
        _swiglu[(triton.cdiv(n, _BLOCK),)](
            gate, up, out, kept, seed, n, p, WRITES_OUT=whole or not drops, WRITES_KEPT=drops, BLOCK=_BLOCK
        )
    return out, kept


def swiglu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, g: Tensor, a: Tensor, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """``dgate`` (in the place of ``dh``) and ``dup``, for ``dh + kept'(g A)``.

    All but ``g``, ``(T, r)``, and ``a``, ``(r, f)``, are ``(T, f)``; all are contiguous.
    """
    dup = torch.empty_like(up)
    rows, f = gate.shape
    r = g.shape[1]
    with _on(gate):
        _swiglu_backward[(triton.cdiv(rows, 32), triton.cdiv(f, 128))](
            dh, gate, up, dup, g, a, seed, rows, f, r, p,
            DROPS=seed is not None, BLOCK_T=32, BLOCK_F=128, BLOCK_R=_rank(r), num_warps=4,
        )  # fmt: skip
    return dh, dup


def norm(x: Tensor, weight: Tensor, epsilon: float, rounds_last: bool) -> tuple[Tensor, Tensor]:
    """``y = x ρ w``, ``(T, d)``, and ``ρ``, ``(T,)`` float32; ``x`` is contiguous."""
    rows, d = x.shape
    y, rho = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(d)
    with _on(x):
        _norm[(rows,)](x, weight, y, rho, d, epsilon, ROUNDS_LAST=rounds_last, BLOCK=block, num_warps=_warps(block))
    return y, rho


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    """``dx``, ``(T, d)``, of :func:`norm`; ``dy`` and ``x`` are contiguous."""
    rows, d = x.shape
    dx = torch.empty_like(x)
    block = triton.next_power_of_2(d)
    with _on(x):
        _norm_backward[(rows,)](dy, x, weight, rho, dx, d, BLOCK=block, num_warps=_warps(block))
    return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """``y₁ = x₁ c₁ - x₂ s₁``, ``y₂ = x₂ c₂ + x₁ s₂``, or the way back.

    Args:
        x: ``(B, H, T, d)``.
        cos: ``(B or 1, H or 1, T or 1, d)``.
        sin: As ``cos``.
        backward: Whether ``x`` is the gradient of ``y`` and that of ``x`` is wanted.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.expand(x.shape), sin.expand(x.shape)
    if not cos.stride(-1) == sin.stride(-1) == 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    heads, tokens, d = x.shape[1:]
    rows, half = x.numel() // d, d // 2
    with _on(x):
        _rotate[(triton.cdiv(rows, 16),)](
            x, cos, sin, y, rows, heads, tokens, half, *x.stride()[:3], *y.stride()[:3], *cos.stride()[:3],
            BACKWARD=backward, ROWS=16, BLOCK=triton.next_power_of_2(half),
        )  # fmt: skip
    return y


def without(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """A copy of ``x``, contiguous, with zeros where the seed, ``(1,)`` int64, says so with probability ``p``."""
    out = torch.empty_like(x)
    with _on(x):
        _without[(triton.cdiv(x.numel(), _BLOCK),)](x, out, seed, x.numel(), p, BLOCK=_BLOCK)
    return out


def add_product(dx: Tensor, g: Tensor, a: Tensor, seed: Tensor, p: float) -> None:
    """Add ``g A`` to ``dx``, ``(T, d)``, where :func:`without` keeps; ``g`` is ``(T, r)``, ``a`` ``(r, d)``."""
    rows, d = dx.shape
    r = g.shape[1]
    with _on(dx):
        _add_product[(triton.cdiv(rows, 32), triton.cdiv(d, 128))](
            dx, g, a, seed, rows, d, r, p, BLOCK_T=32, BLOCK_D=128, BLOCK_R=_rank(r), num_warps=4
        )


def _rank(r: int) -> int:
    return min(64, max(16, triton.next_power_of_2(r)))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels run on the current GPU; that of ``x`` may be another."""
    here = x.device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if here else torch.cuda.device_of(x)
