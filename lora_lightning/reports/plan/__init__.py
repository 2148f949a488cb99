"""A training planned before it runs. Nothing heavy is imported before one of these names is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from lora_lightning.reports.plan.compare import comparison
    from lora_lightning.reports.plan.planned import Plan, plan, plan_of
    from lora_lightning.reports.plan.remedy import remedies
    from lora_lightning.reports.plan.setting import Setting

_HOMES = {
    "Plan": "planned",
    "Setting": "setting",
    "comparison": "compare",
    "plan": "planned",
    "plan_of": "planned",
    "remedies": "remedy",
}

__all__ = ["Plan", "Setting", "comparison", "plan", "plan_of", "remedies"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
