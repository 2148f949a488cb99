"""What a run's figures say about its configuration: advice in words, with the numbers behind each sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from lora_lightning.reports.advice.evidence import Evidence, evidence_of
    from lora_lightning.reports.advice.kinds import Advice
    from lora_lightning.reports.advice.rules import RULES, advise, judge, leave_advice
    from lora_lightning.reports.advice.told import advice_table, as_markdown

_HOMES = {
    "Advice": "kinds",
    "Evidence": "evidence",
    "RULES": "rules",
    "advice_table": "told",
    "advise": "rules",
    "as_markdown": "told",
    "evidence_of": "evidence",
    "judge": "rules",
    "leave_advice": "rules",
}

__all__ = [
    "RULES",
    "Advice",
    "Evidence",
    "advice_table",
    "advise",
    "as_markdown",
    "evidence_of",
    "judge",
    "leave_advice",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
