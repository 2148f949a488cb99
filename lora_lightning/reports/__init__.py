"""What a run tells: sample texts, figures, a picture, tables. Nothing heavy is imported before a name is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.reports.plots import loss_picture
    from lora_lightning.reports.recorder import RunRecorder
    from lora_lightning.reports.samples import SampleWriter
    from lora_lightning.reports.tables import closing_table, first_table

_HOMES = {
    "RunRecorder": "recorder",
    "SampleWriter": "samples",
    "closing_table": "tables",
    "first_table": "tables",
    "loss_picture": "plots",
}

__all__ = ["RunRecorder", "SampleWriter", "closing_table", "first_table", "loss_picture"]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted(__all__)
