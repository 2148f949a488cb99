"""What the adapters do while they train: how much of their rank is used, how far they move the base, where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from lora_lightning.reports.insight.callback import InsightCallback
    from lora_lightning.reports.insight.picture import insight_picture
    from lora_lightning.reports.insight.rows import InsightRow, latest, read_rows

_HOMES = {
    "InsightCallback": "callback",
    "InsightRow": "rows",
    "insight_picture": "picture",
    "latest": "rows",
    "read_rows": "rows",
}

__all__ = ["InsightCallback", "InsightRow", "insight_picture", "latest", "read_rows"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
