"""The rules in their order, and what they say of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lora_lightning.reports.advice.curves import overfitting, too_fast, too_slow, wrong_head
from lora_lightning.reports.advice.evidence import Evidence, evidence_of
from lora_lightning.reports.advice.kinds import SEVERITIES, Advice
from lora_lightning.reports.advice.layers import never_moved, targets_missing
from lora_lightning.reports.advice.rank import saturated, unused
from lora_lightning.reports.advice.told import as_markdown

Rule = Callable[[Evidence], Iterable[Advice]]
RULES: tuple[Rule, ...] = (
    wrong_head,
    too_fast,
    overfitting,
    saturated,
    unused,
    never_moved,
    targets_missing,
    too_slow,
)


def judge(evidence: Evidence) -> list[Advice]:
    """What the rules say of what a run has left; warnings first.

    Args:
        evidence: What was read in its folder.
    """
    found = [advice for rule in RULES for advice in rule(evidence)]
    return sorted(found, key=lambda advice: SEVERITIES.index(advice.severity))


def advise(folder: str | os.PathLike[str], result: Mapping[str, Any] | None = None) -> list[Advice]:
    """Advice on a run, from its folder alone.

    Args:
        folder: The run's folder: ``metrics.csv``, ``insight.csv``, ``config.yaml``, ``result.json``, as far as there.
        result: What ``result.json`` is going to say, while it is not yet written.

    Raises:
        AdapterError: If it is no run's folder, or a file in it cannot be read.
    """
    return judge(evidence_of(folder, result))


def leave_advice(folder: Path, result: Mapping[str, Any]) -> list[Advice] | None:
    """Advice at the end of a run, written to ``advice.md`` in its folder. A run does not fail for it: that warns.

    Args:
        folder: The run's folder.
        result: What ``result.json`` is going to say.

    Returns:
        What the rules say; None of a run that has measured nothing or was broken off before anything was wrong with
        it, and where a file cannot be read.
    """
    try:
        evidence = evidence_of(folder, result)
        found = judge(evidence)
        if evidence.is_empty or not (found or evidence.result.get("status") == "finished"):
            return None
        (folder / "advice.md").write_text(as_markdown(found), encoding="utf-8")
        return found
    except Exception as error:
        rank_zero_warn(f"No advice on the run in {folder}: {error}")
        return None
