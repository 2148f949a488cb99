"""The work of ``resize``: cut, measured on the run's own validation rows, and told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lightning.adapters import ResizeReport, resize_adapter
from lora_lightning.adapters.resize import Resized
from lora_lightning.cli.run_metrics import run_metrics
from lora_lightning.errors import AdapterError, LoraConfigError


def resize_and_tell(
    adapter: str,
    folder: Path,
    r: int | None,
    energy: float | None,
    *,
    run: Path | None,
    base: str | None = None,
    each_layer: bool = False,
) -> ResizeReport:
    """Resize an adapter and print what that kept and what it costs.

    Args:
        adapter: An adapter folder, or one on the Hub.
        folder: Where the new one goes.
        r: The new rank.
        energy: The share of each layer's update to keep.
        run: Whose validation rows the loss is measured on; None measures none.
        base: Another base model than the run's.
        each_layer: Tell of each layer rather than of each kind.

    Raises:
        LoraConfigError: The rank is above the trained one; or, when the new adapter is written, the run's model or data
            cannot be had.
        AdapterError: There is no adapter, or ``folder`` is there already.
    """
    report = resize_adapter(adapter, folder, r, energy=energy)
    console = Console()
    console.print(kept_table(report.layers, each_layer=each_layer))
    console.print(str(report), soft_wrap=True, highlight=False)
    if run is None:
        console.print("The loss was not measured: name a run's folder, which says what data it had, with --run.")
        return report
    try:
        metrics = run_metrics(run, {"before": adapter, "after": folder, "base": None}, base)
    except (LoraConfigError, AdapterError) as error:
        raise type(error)(f"{folder} is written, and its loss could not be measured: {error}") from error
    console.print(cost_table(metrics))
    return report


def kept_table(rows: Iterable[Resized], *, each_layer: bool = False) -> Table:
    """What was kept: a row for each kind of layer (the last part of its name), or for each layer."""
    table = Table("Layers" if not each_layer else "Layer", title="What is kept of each update", title_justify="left")
    for heading in ("Number", "Rank", "New rank", "Of ‖ΔW‖²", "Least"):
        table.add_column(heading, justify="right")
    kinds: dict[str, list[Resized]] = {}
    for row in rows:
        kinds.setdefault(row.layer if each_layer else row.layer.rpartition(".")[2], []).append(row)
    for name, members in kinds.items():
        size = math.fsum(row.size for row in members)
        kept = math.fsum(row.kept * row.size for row in members) / size if size else 1.0
        ranks = [_span(row.was for row in members), _span(row.r for row in members)]
        table.add_row(name, str(len(members)), *ranks, f"{kept:.2%}", f"{min(row.kept for row in members):.2%}")
    return table


def cost_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics of the adapter before and after, and of the base, by name."""
    table = Table("Metric", title="On the run's validation rows", title_justify="left")
    for heading in ("Base", "Before", "After", "Change"):
        table.add_column(heading, justify="right")
    for name, after in metrics["after"].items():
        before = metrics["before"][name]
        cells = (metrics["base"].get(name, math.nan), before, after)
        table.add_row(name, *(f"{value:.4f}" for value in cells), f"{after - before:+.4f}")
    return table


def _span(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]}–{ordered[-1]}"
