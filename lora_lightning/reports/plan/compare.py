"""Several plans side by side."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from lora_lightning.reports.plan.planned import Plan
from lora_lightning.reports.plan.table import duration, size


def comparison(plans: Mapping[str, Plan]) -> Table:
    """A table with a column for each plan.

    Args:
        plans: By what stands over their columns.
    """
    table = Table("", *plans)
    for column in table.columns[1:]:
        column.justify = "right"
    for heading, cells in _lines(list(plans.values())).items():
        table.add_row(heading, *cells)
    return table


def _lines(plans: list[Plan]) -> dict[str, list[str]]:
    return {
        "r": [_distinct([str(kind.r) for kind in plan.adapted if kind.r]) for plan in plans],
        "scale": [_distinct([f"{kind.scaling:g}" for kind in plan.adapted if kind.r]) for plan in plans],
        "layers": [_distinct([kind.name for kind in plan.adapted]) for plan in plans],
        "trains": [f"{plan.report.trainable_parameters:,}" for plan in plans],
        "share": [f"{plan.report.trainable_share:.2%}" for plan in plans],
        "adapter file": [size(plan.file_bytes) for plan in plans],
        "memory of a device": [
            ("at least " if plan.memory.activations is None else "") + size(plan.memory.total) for plan in plans
        ],
        "fits": ["?" if plan.fits is None else "yes" if plan.fits else "no" for plan in plans],
        "largest batch": ["?" if plan.largest_batch is None else f"{plan.largest_batch:,}" for plan in plans],
        "GFLOP a token": [
            "?" if plan.flops_per_token is None else f"{plan.flops_per_token / 1e9:.3g}" for plan in plans
        ],
        "1,000 steps": [duration(plan.seconds_per_1000_steps) for plan in plans],
    }


def _distinct(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "-"
