"""One adapter made of several: their weighted sum, exactly or as one of the merging methods has it.

The names are PEFT's (``add_weighted_adapter``). Without ``_svd`` a method works on the ``A`` and on the ``B`` of the
adapters, which must have one rank then; with it, on the updates ``s · B A``, of whose result the best approximation of
a rank is kept. ``cat`` and ``svd`` (at a rank that suffices) are exact sums.
Sources: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.adapters.spectrum import update_svd
from lora_lightning.errors import LoraConfigError, did_you_mean

_ON_PARTS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_ON_UPDATES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATIONS = (*_ON_PARTS, "cat", *_ON_UPDATES)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; checked when it is made.

    Args:
        how: One of :data:`COMBINATIONS`.
        density: The share of values that the pruning methods keep, over 0 and up to 1.
        majority_sign_method: What elects a sign in TIES: the sum of the values (``"total"``) or their number
            (``"frequency"``).
        svd_rank: Rank of the result of the ``svd`` methods; None takes the largest rank that goes in.
        svd_clamp: Quantile, in [0, 1], of the values of both factors at which they are cut off.
        svd_driver: Of cuSOLVER, where the adapters are on CUDA: ``gesvd``, ``gesvdj`` or ``gesvda``.

    Raises:
        LoraConfigError: With everything that is wrong.
    """

    how: str = "svd"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None

    def __post_init__(self) -> None:
        """Check all settings together."""
        if self.how not in COMBINATIONS:
            near = did_you_mean(str(self.how), COMBINATIONS)
            raise LoraConfigError(f"how must be one of {', '.join(COMBINATIONS)}, got {self.how!r}{near}")
        problems = []
        prunes = self.how not in ("linear", "cat", "svd")
        if prunes and (self.density is None or not 0 < self.density <= 1):
            problems.append(f"how={self.how!r} needs the share of values to keep, density in (0, 1]: {self.density}")
        if not prunes and self.density is not None:
            problems.append(f"density has no effect with how={self.how!r}, which prunes nothing")
        if self.majority_sign_method not in SIGNS:
            problems.append(f"majority_sign_method must be total or frequency, got {self.majority_sign_method!r}")
        if not self.of_updates:
            given = [name for name in ("svd_rank", "svd_clamp", "svd_driver") if getattr(self, name) is not None]
            problems += [f"{name} has no effect with how={self.how!r}" for name in given]
        if self.svd_rank is not None and self.svd_rank < 1:
            problems.append(f"svd_rank must be at least 1, got {self.svd_rank}")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            problems.append(f"svd_clamp must be a quantile in [0, 1], got {self.svd_clamp}")
        if problems:
            raise LoraConfigError("These adapters cannot be combined so:" + "".join(f"\n  - {p}" for p in problems))

    @property
    def of_updates(self) -> bool:
        """Whether it works on the updates, and not on ``A`` and ``B``."""
        return self.how in _ON_UPDATES

    def rank(self, ranks: Sequence[int]) -> int:
        """The rank of the result on a layer, from those of the adapters that have it.

        Raises:
            LoraConfigError: If they differ where the method adds one ``A`` to another.
        """
        if self.how == "cat":
            return sum(ranks)
        if self.of_updates:
            return self.svd_rank or max(ranks)
        if len(set(ranks)) > 1:
            raise LoraConfigError(
                f"how={self.how!r} adds one A to another, so all adapters must have the same r; got r="
                f"{', '.join(map(str, ranks))}. how='cat' and how='svd' take different ranks"
            )
        return ranks[0]


@dataclass(frozen=True)
class Part:
    """What one adapter has on one layer.

    Attributes:
        a: ``(r, in, …)``.
        b: ``(out, r, …)``.
        scaling: The scale ``s``.
        weight: What the adapter counts; below zero it is taken away.
    """

    a: Tensor
    b: Tensor
    scaling: float
    weight: float


@torch.no_grad()
def combined(
    parts: Sequence[Part], way: Combination, rank: int, *, groups: int = 1, in_first: bool = False
) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of a layer, of the given rank and scale 1, in the dtype of the first part.

    Args:
        parts: Adapters that have the layer, in the order in which random numbers are drawn for them.
        way: How.
        rank: Of the result; what the sum does not fill is zero.
        groups: Of a convolution: ``A`` has the rows of one group after those of another.
        in_first: Whether the weight is stored ``(in, out)``: random numbers are drawn in its order, as PEFT does.

    Returns:
        ``(rank, in, …)`` and ``(out, rank, …)``.
    """
    if way.how == "cat":
        return stacked(parts, groups)
    if not way.of_updates:
        return _on_parts(parts, way)
    if groups > 1:
        raise LoraConfigError(f"how={way.how!r} needs the whole update, which a convolution of groups has not: use cat")
    return _on_updates(parts, way, rank, in_first)


def stacked(parts: Sequence[Part], groups: int = 1) -> tuple[Tensor, Tensor]:
    """``[w₁s₁ A₁; w₂s₂ A₂; …]`` and ``[B₁, B₂, …]``, whose product is the weighted sum of the updates."""
    rows = [(part.weight * part.scaling * part.a).unflatten(0, (groups, -1)) for part in parts]
    return torch.cat(rows, dim=1).flatten(0, 1), torch.cat([part.b for part in parts], dim=1)


def _on_parts(parts: Sequence[Part], way: Combination) -> tuple[Tensor, Tensor]:
    """Each factor by itself, both weighted by ``√|w s|``; a sign goes to ``A``."""
    roots = [math.sqrt(abs(part.weight * part.scaling)) for part in parts]
    signed = [math.copysign(root, part.weight * part.scaling) for root, part in zip(roots, parts, strict=True)]
    return _mixed([part.a for part in parts], signed, way), _mixed([part.b for part in parts], roots, way)


def _on_updates(parts: Sequence[Part], way: Combination, rank: int, in_first: bool) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of a rank: ``U S`` and ``Vᵀ`` of the mixed update."""
    first = parts[0]
    exact = torch.promote_types(first.a.dtype, torch.float32)
    lefts, rights = [part.b.to(exact).flatten(1) for part in parts], [part.a.to(exact).flatten(1) for part in parts]
    if way.how == "svd" and way.svd_clamp is None:
        weighted = [part.weight * part.scaling * right for part, right in zip(parts, rights, strict=True)]
        u, s, v = update_svd(torch.cat(weighted), torch.cat(lefts, dim=1))
    else:
        updates = [(b @ a) * part.scaling for part, b, a in zip(parts, lefts, rights, strict=True)]
        updates = [update.t().contiguous() for update in updates] if in_first else updates
        mixed = _mixed(updates, [part.weight for part in parts], way)
        mixed = mixed.t() if in_first else mixed
        driver = way.svd_driver if mixed.is_cuda else None
        u, s, v = torch.linalg.svd(mixed, full_matrices=False, driver=driver)
    left, right = u[:, :rank] * s[:rank], v[:rank]
    if way.svd_clamp is not None:
        high = torch.quantile(torch.cat([left.flatten(), right.flatten()]), way.svd_clamp)
        left, right = left.clamp(-high, high), right.clamp(-high, high)
    a = right.new_zeros(rank, *first.a.shape[1:])
    b = left.new_zeros(first.b.shape[0], rank, *first.b.shape[2:])
    a[: len(right)] = right.reshape(-1, *first.a.shape[1:])
    b[:, : left.shape[1]] = left.reshape(len(b), -1, *first.b.shape[2:])
    return a.to(first.a.dtype), b.to(first.b.dtype)


def _mixed(tensors: Sequence[Tensor], weights: Sequence[float], way: Combination) -> Tensor:
    """Tensors of one shape made into one: pruned, and then summed, or averaged over those of the elected sign."""
    method = way.how.removesuffix("_svd")
    dtype = tensors[0].dtype
    if method in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, way.density or 0) for tensor in tensors]
    elif method in ("dare_linear", "dare_ties"):
        tensors = [_by_chance(tensor, way.density or 0) for tensor in tensors]
    together = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=torch.promote_types(dtype, torch.float32), device=together.device)
    weighted = together * factors.view(-1, *(1,) * (together.dim() - 1))
    if method not in ("ties", "dare_ties"):
        return weighted.sum(0).to(dtype)
    agrees = _elected(together, way.majority_sign_method)
    return ((weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)).to(dtype)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The share ``density`` of the values that are largest in size; zeros for the others."""
    if density == 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view_as(tensor)


def _by_chance(tensor: Tensor, density: float) -> Tensor:
    """Each value with the probability ``density``, divided by it; zeros for the others (DARE)."""
    return tensor if density == 1 else tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _elected(together: Tensor, method: str) -> Tensor:
    """Where a value has the sign that most have, ``(n, …)`` for tensors ``(n, …)``; on a tie that is plus (TIES)."""
    signs = together.sign()
    votes = (together if method == "total" else signs).sum(0)
    return signs == torch.where(votes >= 0, 1, -1)
