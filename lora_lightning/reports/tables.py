"""The table before training, which says what is going to be trained, and the one after it, which says what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_lightning.injection import LoraReport


def effective_batch(rows: int, accumulated: int = 1, devices: int = 1) -> str:
    """The rows of one optimizer step, as a sum that one can check.

    >>> effective_batch(4, 2, 2)
    '4 rows × 2 accumulated × 2 devices = 16'
    >>> effective_batch(4)
    '4 rows'
    """
    factors = [f"{rows} rows"]
    factors += [f"{accumulated} accumulated"] if accumulated > 1 else []
    factors += [f"{devices} devices"] if devices > 1 else []
    product = rows * accumulated * devices
    return " × ".join(factors) + (f" = {product}" if len(factors) > 1 else "")


def first_table(
    report: LoraReport,
    *,
    batch_size: int | None = None,
    accumulate: int = 1,
    devices: int = 1,
    **facts: Any,
) -> RenderableType:
    """Say which layers are adapted and how, what share of the model trains, and what one step sees.

    Args:
        report: The `LoraReport` of the injection.
        batch_size: Rows a batch and device; None leaves the line out.
        accumulate: Batches a step.
        devices: Devices, each with batches of its own.
        **facts: More lines, by name (``_`` shown as a blank); those that are None are left out.
    """
    lines = {
        "Trains": f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters "
        f"({report.trainable_share:.2%})",
        "One step": None if batch_size is None else effective_batch(batch_size, accumulate, devices),
    }
    return Group(
        report.table("Adapted layers"),
        _pairs(lines | {key.replace("_", " ").capitalize(): facts[key] for key in facts}),
    )


def closing_table(result: Mapping[str, Any]) -> RenderableType:
    """Say what came out of a run.

    Args:
        result: The content of ``result.json``; what is not known is left out.
    """

    def change(key: str, digits: int = 3) -> str | None:
        before, after = result.get(f"{key}_before"), result.get(key)
        if after is None:
            return None
        return f"{after:.{digits}f}" if before is None else f"{before:.{digits}f} → {after:.{digits}f}"

    def shown(key: str, text: str, scale: float = 1.0) -> str | None:
        return None if result.get(key) is None else text.format(result[key] * scale)

    lines = {
        "Status": result.get("status"),
        "Validation loss": change("val_loss"),
        "Perplexity": change("val_perplexity", 2) or shown("perplexity", "{:.2f}"),
        "Accuracy": change("val_accuracy"),
        "F1": change("val_f1"),
        "Steps": shown("steps", "{:,.0f}"),
        "Time": shown("seconds", "{:,.0f} s"),
        "Speed": shown("tokens_per_second", "{:,.0f} tokens/s"),
        "Peak memory": shown("peak_memory_bytes", "{:.2f} GiB", 2**-30),
        "Adapter": result.get("adapter_path"),
    }
    return _pairs(lines, title="Result")


def _pairs(lines: Mapping[str, Any], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    return table
