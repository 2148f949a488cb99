"""Whether the rank is too small or too large, by the spectra of the updates.

An optimizer like Adam moves in all directions that it has, so that even an update that needs few of them has a little
in each. A rank is short where the directions that it has carry alike, and ample where few of them carry all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean

from lora_lightning.reports.advice.evidence import Evidence
from lora_lightning.reports.advice.kinds import Advice, counted, percent
from lora_lightning.reports.insight.rows import InsightRow

EVEN = 0.3
"""A layer's rank is short where all of it is used and its stable rank is more than this share of it."""
MOST = 0.5
"""The rank of all is short where that of so many layers is, and a kind's where that of so many of the kind is."""


def saturated(evidence: Evidence) -> Iterator[Advice]:
    """All directions are used, and used alike: more of them would be too."""
    if evidence.overfits or not evidence.adapted:
        return
    of_kind: dict[str, list[InsightRow]] = defaultdict(list)
    for row in evidence.adapted:
        of_kind[evidence.kinds[row.layer]].append(row)
    full = [row for row in evidence.adapted if _is_full(row)]
    short = {kind: rows for kind, rows in of_kind.items() if sum(map(_is_full, rows)) >= MOST * len(rows)}
    if not short:
        return
    numbers = {
        "layers": len(full),
        "of": len(evidence.adapted),
        "stable_rank": fmean(row.stable_rank or 0 for row in full),
        "rank": fmean(row.rank or row.r for row in full),
    }
    seen = (
        f"All of the rank is used, and evenly, in {len(full)} of {len(evidence.adapted)} layers "
        f"({counted(evidence.kinds[row.layer] for row in full)}): their stable rank is {numbers['stable_rank']:.1f} of "
        f"{numbers['rank']:.3g} on average"
    )
    r = evidence.r
    if r is not None and len(full) >= MOST * len(evidence.adapted):
        yield Advice("rank saturated", "hint", f"{seen}. Try r={raised(r)}.", numbers, with_rank(evidence, raised(r)))
        return
    ranks = {kind: raised(max(row.r for row in rows)) for kind, rows in short.items()}
    told = ", ".join(f"{kind}: {rank}" for kind, rank in ranks.items())
    yield Advice(
        "rank saturated", "hint", f"{seen}. Try a larger rank there: {told}.", numbers, _pattern(evidence, ranks)
    )


def unused(evidence: Evidence) -> Iterator[Advice]:
    """Half of the rank, or less, would hold what nearly every layer has learned."""
    rows, r = evidence.adapted, evidence.r
    needed = sorted(row.rank_95 for row in rows if row.rank_95 is not None)
    if r is None or len(needed) < 2 or any(row.r != r for row in rows):
        return
    most = needed[int(0.95 * (len(needed) - 1))]
    lower = max(2, 1 << (math.ceil(most) - 1).bit_length()) if most else r
    if lower > r // 2:
        return
    yield Advice(
        "rank unused",
        "hint",
        f"{most:.0f} of {r} directions hold 95 % of the update in nearly every layer. The same validation loss is "
        f"expected at r={lower}, with {percent(1 - lower / r)} fewer parameters to train and to store.",
        {"r": r, "needed_mean": fmean(needed), "needed_95th_percentile": most, "suggested_r": lower},
        with_rank(evidence, lower),
    )


def raised(r: int) -> int:
    """The next rank to try: 8 and 16 are where most tasks are at home, and beyond them twice the rank.

    >>> [raised(r) for r in (1, 4, 8, 16, 64)]
    [8, 16, 16, 32, 128]
    """
    return 8 if r < 4 else 16 if r < 8 else 2 * r


def with_rank(evidence: Evidence, r: int) -> str:
    """The override for another rank at the same scale: alpha follows by itself unless it was given."""
    if not evidence.given("lora.lora_alpha"):
        return f"lora.r={r}"
    return f"lora.r={r} lora.lora_alpha={_alpha(evidence, r):g}"


def _alpha(evidence: Evidence, r: int) -> float:
    """The alpha that keeps the scale."""
    ratio = r / (evidence.r or r)
    return float(evidence.lora.get("lora_alpha", r)) * (ratio**0.5 if evidence.lora.get("use_rslora") else ratio)


def _pattern(evidence: Evidence, ranks: dict[str, int]) -> str:
    """Overrides for other ranks in some layers, at the scale that they have; patterns that are there stay."""
    alphas = {kind: _alpha(evidence, rank) for kind, rank in ranks.items()}
    return " ".join(
        f"'+lora.{name}_pattern={{{','.join(f'{kind}:{value:g}' for kind, value in pattern.items())}}}'"
        for name, pattern in (("rank", ranks), ("alpha", alphas))
    )


def _is_full(row: InsightRow) -> bool:
    rank = row.rank or row.r
    return (row.rank_used or 0) > 1 - 0.5 / rank and (row.stable_rank or 0) > EVEN * rank
