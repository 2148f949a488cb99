"""What a run tells: sample texts, figures, a picture, tables. Nothing heavy is imported before a name is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from lora_lightning.reports.insight import InsightCallback
    from lora_lightning.reports.plots import loss_picture
    from lora_lightning.reports.recorder import RunRecorder
    from lora_lightning.reports.samples import SampleWriter
    from lora_lightning.reports.tables import closing_table, first_table

_HOMES = {
    "InsightCallback": "insight",
    "RunRecorder": "recorder",
    "SampleWriter": "samples",
    "closing_table": "tables",
    "first_table": "tables",
    "loss_picture": "plots",
}

__all__ = ["InsightCallback", "RunRecorder", "SampleWriter", "closing_table", "first_table", "loss_picture"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
