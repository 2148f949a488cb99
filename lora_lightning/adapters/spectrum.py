"""The update of a layer seen through its singular values, from the two small factors and never from the product.

``ΔW = s · B A`` has rank ``r`` at most, so its decomposition is that of an ``r × r`` core: with ``B = Q_B R_B`` and
``Aᵀ = Q_A R_A`` it is ``ΔW = s · Q_B (R_B R_Aᵀ) Q_Aᵀ``. That costs ``(out + in) · r²`` where the product alone would
cost ``out · in · r``. Everything is computed in float64 (in float32 where a device has no more), whatever the factors'
dtype, and without gradients.

Sizes: ``n`` updates of one layer (the experts of a mixture, the groups of a convolution; else 1), ``k`` singular
values, the smallest of ``r``, ``in`` and ``out``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.injection.starts.residual import START, starts_of
from lora_lightning.injection.tensors import whole
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.parameters import LoraParameter

ENERGY = 0.99
"""The share of ``‖ΔW‖²`` that counts as all of it, where it is counted how much of the rank is used."""


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a layer: ``scaling · b a`` for each of ``n`` updates.

    Attributes:
        a: ``(n, r, in)``; of a convolution ``in`` is its channels times its kernel.
        b: ``(n, out, r)``.
        scaling: The scale ``s``.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The rank that each update may have, as far as the factors go."""
        return self.a.shape[-2]


@dataclass(frozen=True)
class Spectrum:
    """What the singular values ``σ`` of a layer's update tell. All are 0 for an update that is 0.

    Of several updates (experts, groups) each number is the mean over those that are not 0; ``norm`` is that of all.

    Attributes:
        rank: What an update's rank could be.
        effective_rank: ``exp(−Σ p log p)`` with ``p = σ / Σσ`` (Roy and Vetterli 2007): between 1 and the rank, the
            latter where all directions are alike.
        stable_rank: ``‖ΔW‖_F² / ‖ΔW‖₂²``, between 1 and the rank; small ``σ`` hardly count.
        used: How many of the largest ``σ`` it takes to hold 99 % of ``‖ΔW‖_F²``.
        used_95: The same for 95 %, where the little that an optimizer leaves in every direction counts less.
        lesser_half: The share of ``‖ΔW‖_F²`` that half of the rank would lose; None of a rank that has no half.
        norm: ``‖ΔW‖_F``.
    """

    rank: int
    effective_rank: float
    stable_rank: float
    used: float
    used_95: float
    lesser_half: float | None
    norm: float

    @property
    def rank_used(self) -> float:
        """The share of the rank that is used, between 0 and 1."""
        return self.used / self.rank


def factors_of(layer: LoraLayer, tensors: Mapping[str, Tensor] | None = None) -> Factors:
    """The two factors of a layer's update as matrices, whatever the kind of the layer.

    The product ``b a`` is ``(out, in)`` for every kind: the weight of an embedding and of a ``Conv1D`` is stored the
    other way round, which changes no singular value. Where a start has changed the base's weight (PiSSA), the update is
    that of the base as it was, ``s · (B A − B₀ A₀) = s · [B, −B₀] [A; A₀]``, of twice the rank. Of DoRA it is the
    update of the direction, ``s · B A``, before the weight's lengths are set.

    Args:
        layer: An adapted layer. What a sharding engine has spread is made whole: call it on every process then.
        tensors: The values of ``lora_A``, ``lora_B`` and of ``lora_A_start``, ``lora_B_start`` where the layer has
            them, if they are at hand already.
    """
    if tensors is None:
        tensors = factor_tensors(layer)
    there = {name: whole(value.detach()) for name, value in tensors.items()}
    a, b = _matrices(layer, there["lora_A"], there["lora_B"])
    if f"lora_A{START}" in there:
        a_start, b_start = _matrices(layer, there[f"lora_A{START}"], there[f"lora_B{START}"])
        a, b = torch.cat([a, a_start], dim=1), torch.cat([b, -b_start], dim=2)
    return Factors(a, b, layer.lora_scaling)


def factor_tensors(layer: LoraLayer) -> dict[str, Tensor]:
    """The tensors that :func:`factors_of` reads, by name; spread ones as they are."""
    return {"lora_A": layer.lora_A, "lora_B": layer.lora_B} | starts_of(layer)


@torch.no_grad()
def update_svd(a: Tensor, b: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``σ``, ``Vᵀ`` of ``ΔW = s · B A``, of which the first columns make the best update of a lower rank.

    Args:
        a: ``A``, ``(..., r, in)``.
        b: ``B``, ``(..., out, r)``.
        scaling: The scale ``s``, of either sign.

    Returns:
        ``U (..., out, k)``, ``σ (..., k)`` from large to small, ``Vᵀ (..., k, in)``, in float64 or float32.

    >>> u, sigma, vt = update_svd(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    >>> sigma.round().tolist(), (u * sigma @ vt).round().abs().tolist()
    ([10.0], [[6.0, 8.0], [0.0, 0.0]])
    """
    q_b, r_b = torch.linalg.qr(_exact(b))
    q_a, r_a = torch.linalg.qr(_exact(a).mT)
    u, sigma, vt = torch.linalg.svd(scaling * (r_b @ r_a.mT), full_matrices=False)
    return q_b @ u, sigma, vt @ q_a.mT


def effective_rank(sigma: Tensor) -> Tensor:
    """``exp`` of the entropy of ``σ / Σσ`` (Roy and Vetterli 2007): ``(..., k) -> (...)``; 0 where all ``σ`` are.

    >>> effective_rank(torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [4.0, 1.0, 0.0]
    """
    total = sigma.sum(-1)
    share = sigma / total.clamp(min=_tiny(sigma))[..., None]
    return torch.where(total > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def stable_rank(sigma: Tensor) -> Tensor:
    """``Σσ² / max σ²``: ``(..., k) -> (...)``; 0 where all ``σ`` are.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0])).item()
    1.5
    """
    relative = sigma / sigma[..., :1].clamp(min=_tiny(sigma))
    return relative.square().sum(-1)


def used_rank(sigma: Tensor, energy: float = ENERGY) -> Tensor:
    """The smallest number of ``σ`` that hold a share of ``Σσ²``: ``(..., k) -> (...)``; 0 where all ``σ`` are.

    Args:
        sigma: From large to small.
        energy: The share, above 0 and up to 1.

    >>> used_rank(torch.tensor([5.0, 1.0, 0.1])).item(), used_rank(torch.tensor([1.0, 1.0, 1.0])).item()
    (2, 3)
    """
    held = (sigma / sigma[..., :1].clamp(min=_tiny(sigma))).square().cumsum(-1)
    enough = energy * held[..., -1:] * (1 - 1e-12)  # so that rounding asks for no more of them
    return torch.where(sigma[..., 0] > 0, (held < enough).sum(-1) + 1, 0)


def lesser_half(sigma: Tensor) -> Tensor:
    """The share of ``Σσ²`` that the lesser half of the ``σ`` hold: ``(..., k) -> (...)``, from 0 to ½ (all alike).

    The best update of half the rank lacks it. Where the wanted update goes on beyond the rank as it does within it,
    twice the rank adds about as much again. An odd one in the middle counts half.

    Args:
        sigma: From large to small.

    >>> lesser_half(torch.tensor([[2.0, 2.0, 2.0, 2.0], [3.0, 0.0, 0.0, 0.0]])).tolist()
    [0.5, 0.0]
    >>> lesser_half(torch.tensor([1.0, 1.0, 1.0])).item()
    0.5
    """
    energy = (sigma / sigma[..., :1].clamp(min=_tiny(sigma))).square()
    k = sigma.shape[-1]
    lesser = energy[..., (k + 1) // 2 :].sum(-1) + (energy[..., k // 2] / 2 if k % 2 else 0.0)
    return lesser / energy.sum(-1).clamp(min=1.0)


def spectrum_of(layer: LoraLayer) -> Spectrum:
    """The spectrum of a layer's update; see :func:`factors_of` for what the update of each kind is."""
    return spectra({"": factors_of(layer)})[""]


def spectra(updates: Mapping[str, Factors]) -> dict[str, Spectrum]:
    """The spectrum of many layers' updates, the small cores of one size decomposed together and on the CPU.

    Args:
        updates: What :func:`factors_of` has made of each layer.
    """
    cores = {name: (each.scaling * _core(each.a, each.b)).cpu() for name, each in updates.items()}
    of_size: dict[torch.Size, list[str]] = {}
    for name, core in cores.items():
        of_size.setdefault(core.shape[1:], []).append(name)
    found: dict[str, Spectrum] = {}
    for names in of_size.values():
        sigmas = torch.linalg.svdvals(torch.cat([cores[name] for name in names]))
        parts = sigmas.split([len(cores[name]) for name in names])
        found |= {name: _summed_up(sigma, updates[name].rank) for name, sigma in zip(names, parts, strict=True)}
    return {name: found[name] for name in updates}


def _summed_up(sigma: Tensor, rank: int) -> Spectrum:
    """``(n, k)`` to what it tells."""
    moved, has_half = sigma[sigma[:, 0] > 0], sigma.shape[1] > 1
    if not len(moved):
        return Spectrum(rank, 0.0, 0.0, 0.0, 0.0, 0.0 if has_half else None, 0.0)

    def mean(of_each: Tensor) -> float:
        return float(of_each.double().mean())

    return Spectrum(
        rank,
        effective_rank=mean(effective_rank(moved)),
        stable_rank=mean(stable_rank(moved)),
        used=mean(used_rank(moved)),
        used_95=mean(used_rank(moved, 0.95)),
        lesser_half=mean(lesser_half(moved)) if has_half else None,
        norm=float(torch.linalg.vector_norm(sigma)),
    )


def _matrices(layer: LoraLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(n, r, in)`` and ``(n, out, r)``, of ``A`` and ``B`` as a layer has them."""
    if isinstance(layer, LoraParameter):
        return a.unflatten(0, (layer.lora_experts, -1)), b.unflatten(1, (-1, layer.lora_experts)).permute(2, 0, 1)
    groups = getattr(layer, "groups", 1) if layer.lora_kind == "Conv" else 1
    return a.flatten(1).unflatten(0, (groups, -1)), b.flatten(1).unflatten(0, (groups, -1))


def _core(a: Tensor, b: Tensor) -> Tensor:
    """``R_B R_Aᵀ (..., ≤r, ≤r)``, which has the singular values of ``B A``."""
    r_b = torch.linalg.qr(_exact(b), mode="r").R
    r_a = torch.linalg.qr(_exact(a).mT, mode="r").R
    return r_b @ r_a.mT


def _exact(tensor: Tensor) -> Tensor:
    """In float64; in float32 on a device that has nothing better."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _tiny(like: Tensor) -> float:
    return math.ulp(0.0) if like.dtype == torch.float64 else torch.finfo(like.dtype).tiny
