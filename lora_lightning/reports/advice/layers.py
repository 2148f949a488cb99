"""Layers that never moved, and layers that were not asked to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from lora_lightning.injection.matching import matches
from lora_lightning.reports.advice.evidence import Evidence
from lora_lightning.reports.advice.kinds import Advice, counted, percent

STILL = 1e-3
"""A layer has not moved that has changed by less than this share of what is usual in the run."""
MUCH = 0.3
"""Layers without an adapter are worth a word where they have this share of the linear layers' weights."""


def never_moved(evidence: Evidence) -> Iterator[Advice]:
    """Adapters that are where they began although the others are not."""
    known = [row for row in evidence.adapted if row.relative_norm is not None]
    if not known:
        return
    usual = median([row.relative_norm for row in known if row.relative_norm] or [0.0])
    still = [row for row in known if (row.relative_norm or 0.0) <= STILL * usual]
    if not still or len(still) == len(known):
        return
    names = [row.layer for row in still]
    told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    gradients = [norm for row in still for norm in (row.grad_norm_A, row.grad_norm_B) if norm is not None]
    unreached = bool(gradients) and not any(gradients)
    why = "No gradient reaches them: the model does not use them in these rows" if unreached else "They may be left out"
    yield Advice(
        "layers that never moved",
        "hint",
        f"{len(still)} of {len(known)} adapted layers are where they began ({told}), while the others have moved by "
        f"{percent(usual)} of their weight. {why}.",
        {"layers": names, "median_relative_norm": usual, "without_gradient": unreached},
        _without(evidence, names),
    )


def targets_missing(evidence: Evidence) -> Iterator[Advice]:
    """A good part of the linear layers has no adapter."""
    sizes: dict[bool, int] = defaultdict(int)
    for row in (*evidence.adapted, *evidence.left_out):
        sizes[bool(row.r)] += row.parameters or 0
    if not evidence.left_out or not evidence.adapted or evidence.overfits:
        return
    share = sizes[False] / max(sum(sizes.values()), 1)
    if share < MUCH or evidence.lora.get("layers_to_transform") or evidence.lora.get("exclude_modules"):
        return
    yield Advice(
        "targets missing",
        "hint",
        f"{len(evidence.left_out)} linear layers with {percent(share)} of the linear weights have no adapter: "
        f"{counted(evidence.kinds[row.layer] for row in evidence.left_out)}. No rank makes up for layers that are left "
        "out; if the loss is not low enough, adapt them all.",
        {"layers": len(evidence.left_out), "share_of_weights": share},
        "lora.target_modules=all-linear",
    )


def _without(evidence: Evidence, names: list[str]) -> str | None:
    known = evidence.lora.get("exclude_modules") or []
    names = [name for name in names if not matches(evidence.lora.get("target_parameters") or (), name)]
    if isinstance(known, str) or not 0 < len(names) <= 40:  # a regular expression cannot be added to
        return None
    return "'lora.exclude_modules=[{}]'".format(",".join([*known, *names]))
