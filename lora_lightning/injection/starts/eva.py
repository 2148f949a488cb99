"""EVA: ``A`` begins with the directions in which a layer's inputs vary most; ranks go where those explain most.

Source: EVA, arXiv 2410.07170. The singular values and vectors are those of all inputs seen so far, brought up to date
batch by batch (incremental PCA: Ross et al. 2008), as PEFT does it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.starts.decompositions import svd_lowrank
from lora_lightning.injection.starts.inputs import leaders_of, scored, watched

_MOST_RHO = 1000  # beyond it, ranks have no limit but the layers' sides
_SEED = 42  # PEFT's, of the randomised decompositions
_ITERATIONS = 4


class Directions:
    """Principal directions of rows that come in batches.

    Args:
        count: How many directions.

    Attributes:
        vectors: ``(count, d)``, or None before the first batch.
        values: Singular values, ``(count,)``.
        explained: Share of the variance along each, ``(count,)``.
        settled: Which of them the last batch has hardly turned, ``(count,)``.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.vectors: Tensor | None = None
        self.values = self.explained = torch.zeros(count)
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._seen = 0
        self._mean = self._spread = torch.zeros(())

    def add(self, rows: Tensor, tau: float) -> None:
        """Take in rows ``(n, d)``; fewer than there are directions are passed over."""
        if len(rows) < self.count:
            return
        rows, before, n, seen = rows.float(), self.vectors, len(rows), self._seen
        own_mean = rows.mean(dim=0, dtype=torch.float64)
        spread = (rows - own_mean).square().sum(dim=0, dtype=torch.float64)
        centred = (rows - own_mean).float()
        if before is not None:
            apart = self._mean - own_mean
            shift = (seen / (seen + n) * n) ** 0.5 * apart
            centred = torch.vstack([self.values[:, None] * before, centred, shift[None].float()])
            spread += self._spread + seen * n / (seen + n) * apart.square()
            own_mean = (seen * self._mean + n * own_mean) / (seen + n)
        self._seen, self._mean, self._spread = seen + n, own_mean, spread
        _, values, vectors = svd_lowrank(centred, min(2 * self.count, *centred.shape), _ITERATIONS, _SEED)
        signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        self.vectors, self.values = (vectors * signs)[: self.count], values[: self.count]
        self.explained = self.values.square() / spread.sum()
        if before is not None:
            self.settled = F.cosine_similarity(self.vectors, before) >= tau


def eva(
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    sides: Mapping[str, int],
    settings: Mapping[str, Any],
    batches: Iterable[Any],
    forward: Callable[[Any], object],
) -> dict[str, Tensor]:
    """First values of ``A``, ``(r, in)`` with the rank that a layer is to have, which may be 0.

    Args:
        layers: Layers by name.
        ranks: The rank of each before they are dealt anew; their sum stays.
        sides: Input size of each.
        settings: ``rho`` (a layer gets at most ``rho`` times its rank), ``tau``, ``use_label_mask``,
            ``label_mask_value`` and ``whiten``, as in PEFT.
        batches: Batches, of which as many are taken as the directions need to settle.
        forward: Runs the model on a batch.

    Raises:
        LoraConfigError: If no batch has as many tokens as directions are wanted.
    """
    rho = settings["rho"]
    if rho > _MOST_RHO:
        rho = min(rho, max(sides.values()) / min(ranks.values()))
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise LoraConfigError("init_lora_weights='eva' looks at data, and there is no batch")
    leader = leaders_of(layers, lambda: forward(first))
    # As many directions for each layer of one input, all of which one decomposition serves.
    most = {name: min(round(ranks[name] * rho), sides[name]) for name in layers}
    for name in layers:
        most[leader[name]] = max(most[leader[name]], most[name])
    most = {name: most[leader[name]] for name in layers}
    found = {name: Directions(most[name]) for name in layers if leader[name] == name}
    dealt = dict(most)
    batch: Any = first
    while batch is not None:
        waiting = [name for name, each in found.items() if not bool(each.settled[: dealt[name]].all())]
        if not waiting:
            break
        _look(layers, {name: found[name] for name in waiting}, settings, batch, forward)
        if all(each.vectors is not None for each in found.values()):
            dealt = _deal(found, leader, most, sum(ranks.values()))
        batch = next(stream, None)
    _tell(found, dealt)
    return {name: _first(found[leader[name]], dealt[name], whiten=settings["whiten"]) for name in layers}


def _look(
    layers: Mapping[str, nn.Module],
    found: Mapping[str, Directions],
    settings: Mapping[str, Any],
    batch: Any,
    forward: Callable[[Any], object],
) -> None:
    masked = settings["label_mask_value"] if settings["use_label_mask"] else None

    def take(name: str, x: Tensor) -> None:
        found[name].add(scored(x, batch, masked), settings["tau"])

    with watched({name: layers[name] for name in found}, take):
        forward(batch)


def _deal(
    found: Mapping[str, Directions], leader: Mapping[str, str], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The budget's directions that explain most, wherever they are; of layers on one input the first gets most."""
    order = [*found, *(name for name in leader if name not in found)]
    names = [name for name in order for _ in found[leader[name]].explained[: most[name]]]
    explained = torch.cat([found[leader[name]].explained[: most[name]].cpu() for name in order])
    best = explained.argsort(descending=True)[:budget].tolist()
    counts = Counter(names[i] for i in best)
    dealt = {name: counts.get(name, 0) for name in order}
    for name in order:
        first = leader[name]
        if dealt[first] < dealt[name]:
            dealt[first], dealt[name] = dealt[name], dealt[first]
    return dealt


def _first(directions: Directions, r: int, *, whiten: bool) -> Tensor:
    assert directions.vectors is not None
    vectors = directions.vectors[:r]
    return vectors / directions.values[:r].sqrt()[:, None] if whiten else vectors


def _tell(found: Mapping[str, Directions], dealt: Mapping[str, int]) -> None:
    if empty := [(name, each.count) for name, each in found.items() if each.vectors is None]:
        name, count = empty[0]
        raise LoraConfigError(
            f"init_lora_weights='eva' wants {count} directions of {name}, and no batch had as many tokens that count: "
            "use larger batches, a smaller r or eva_config.rho, or eva_config.use_label_mask=False"
        )
    if turning := [name for name, each in found.items() if not bool(each.settled[: dealt[name]].all())]:
        warnings.warn(
            f"EVA: in {len(turning)} of {len(found)} layers the directions still turned with the last batch (first: "
            f"{turning[0]}); more batches (eva_config.batches) or a smaller eva_config.tau settle them",
            stacklevel=2,
        )
