"""Whether the rank is too small or too large, by the spectra of the updates.

An optimizer like Adam moves in all directions that it has, so that even an update that needs few of them has a little
in each, and how many are used tells nothing. What tells is how much the lesser half of them holds: as much as a lower
rank would lose, and, where the update goes on as it has begun, about as much as twice the rank would add.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from lora_lightning.injection.matching import pattern_value, patterns_for
from lora_lightning.reports.advice.evidence import Evidence
from lora_lightning.reports.advice.kinds import Advice, counted, percent
from lora_lightning.reports.insight.rows import InsightRow

SHORT = 0.2
"""A layer's rank is short where the lesser half of its directions holds more than this share of the update."""
MOST = 0.5
"""The rank of all is short where that of so many layers is, and a kind's where that of so many of the kind is."""
HOME, SOME = 8, 0.25
"""Below this rank, which costs next to nothing, it is short where that of so many layers is."""


def saturated(evidence: Evidence) -> Iterator[Advice]:
    """The lesser directions carry so much that there are likely to be more."""
    rows, r = evidence.adapted, evidence.r
    short = _short_kinds(rows, evidence.kinds)
    if not short or evidence.overfits or not evidence.has_learned:
        return
    full = [row for row in rows if _is_short(row)]
    share = fmean(row.lesser_half or 0.0 for row in full)
    numbers = {
        "layers": len(full),
        "of": len(rows),
        "lesser_half": share,
        "rank": fmean(row.rank or row.r for row in full),
    }
    seen = (
        f"In {len(full)} of {len(rows)} layers ({counted(evidence.kinds[row.layer] for row in full)}) the "
        f"lesser half of the directions still holds {percent(share)} of the update on average: more directions are "
        "likely to be used too"
    )
    if r is not None and all(row.r == r for row in rows) and len(full) >= (SOME if r < HOME else MOST) * len(rows):
        yield Advice("rank saturated", "hint", f"{seen}. Try r={raised(r)}.", numbers, with_rank(evidence, raised(r)))
        return
    ranks = {kind: raised(r) for kind, r in short.items()}
    told = ", ".join(f"{kind}: {rank}" for kind, rank in ranks.items())
    yield Advice(
        "rank saturated", "hint", f"{seen}. Try a larger rank there: {told}.", numbers, _pattern(evidence, ranks)
    )


def unused(evidence: Evidence) -> Iterator[Advice]:
    """Half of the rank, or less, would hold nearly all of what half of the layers have learned.

    On the demo at r=64, which is such a run, the adapter cut to half of its rank lost nothing (docs/shipping.md).
    """
    rows, r = evidence.adapted, evidence.r
    needed = sorted(row.rank_95 for row in rows if row.rank_95 is not None)
    if r is None or len(needed) < 2 or any(row.r != r for row in rows) or not evidence.has_learned:
        return
    if evidence.is_underway or _short_kinds(rows, evidence.kinds):  # on the way, more rank is also a longer step
        return
    usual = median(needed)
    lower = max(2, 1 << (math.ceil(usual) - 1).bit_length()) if usual else r
    if lower > r // 2:
        return
    yield Advice(
        "rank unused",
        "hint",
        f"In half of the layers {usual:.0f} of {r} directions or fewer hold 95 % of the update. The same validation "
        f"loss is expected at r={lower} of this adapter when it is cut (`lora-lightning resize`), with "
        f"{percent(1 - lower / r)} fewer parameters, and about that of one trained so.",
        {"r": r, "needed_mean": fmean(needed), "needed_median": usual, "suggested_r": lower},
        with_rank(evidence, lower),
    )


def raised(r: int) -> int:
    """The next rank to try: 8 and 16 are where most tasks are at home, and beyond them twice the rank.

    >>> [raised(r) for r in (1, 4, 8, 16, 64)]
    [8, 16, 16, 32, 128]
    """
    return 8 if r < 4 else 16 if r < 8 else 2 * r


def with_rank(evidence: Evidence, r: int) -> str | None:
    """The override for another rank at the same scale, whoever has set alpha; None where no short line says it."""
    alpha, of_layers = evidence.lora.get("lora_alpha"), evidence.lora.get("alpha_pattern")
    if alpha is None or not evidence.r:
        return f"lora.r={r}"
    if evidence.lora.get("rank_pattern"):
        return None
    rank = f"lora.r={r} lora.lora_alpha={_alpha(evidence, alpha, r / evidence.r):g}"
    if not of_layers:
        return rank
    line = _line("alpha", {key: _alpha(evidence, each, r / evidence.r) for key, each in of_layers.items()})
    return line and f"{rank} {line}"


def _alpha(evidence: Evidence, alpha: float, ratio: float) -> float:
    """The alpha that keeps the scale of a rank that is so many times as large."""
    return alpha * (math.sqrt(ratio) if evidence.lora.get("use_rslora") else ratio)


def _pattern(evidence: Evidence, ranks: Mapping[str, int]) -> str | None:
    """Overrides for other ranks in some kinds of layers, at the scale that they have; patterns that are there stay.

    None where no short line says it, or one that the patterns which are there leave without effect.
    """
    r, alpha = evidence.r, evidence.lora.get("lora_alpha")
    if r is None or alpha is None:
        return None
    of_rank: dict[str, float] = {}
    of_alpha: dict[str, float] = {}
    names = {row.layer for row in evidence.adapted}
    known = {name: evidence.lora.get(f"{name}_pattern") or {} for name in ("rank", "alpha")}
    for row in evidence.adapted:
        above = row.layer.rpartition(".")[0]
        meant = above if above in names else row.layer  # a projection of an attention that is adapted as a whole
        of_rank[meant] = max(of_rank.get(meant, 0), ranks.get(evidence.kinds[row.layer], row.r))
        of_alpha[meant] = _alpha(evidence, pattern_value(known["alpha"], meant, alpha), of_rank[meant] / row.r)
    told = []
    for name, values, default in (("rank", of_rank, r), ("alpha", of_alpha, alpha)):
        pattern = patterns_for(values, default)
        both = known[name] | pattern
        if any(pattern_value(both, layer, default) != value for layer, value in values.items()):
            return None
        if (line := _line(name, pattern)) is None:
            return None
        told.append(line)
    return " ".join(told)


def _line(name: str, pattern: Mapping[str, float]) -> str | None:
    """The override that adds a pattern; None where it is long, or its keys are no plain names."""
    if len(pattern) > 40 or not all(re.fullmatch(r"[\w.]+", key) for key in pattern):
        return None
    return f"'+lora.{name}_pattern={{{','.join(f'{key}:{value:g}' for key, value in pattern.items())}}}'"


def _short_kinds(rows: Sequence[InsightRow], kinds: Mapping[str, str]) -> dict[str, int]:
    """The kinds of layers that are short of rank, each with the largest rank that one of them has."""
    of_kind: dict[str, list[InsightRow]] = defaultdict(list)
    for row in rows:
        of_kind[kinds[row.layer]].append(row)
    return {
        kind: max(row.r for row in alike)
        for kind, alike in of_kind.items()
        if sum(map(_is_short, alike)) >= MOST * len(alike)
    }


def _is_short(row: InsightRow) -> bool:
    return (row.lesser_half or 0.0) > SHORT
