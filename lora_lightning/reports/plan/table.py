"""How a plan is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_lightning.reports.plan.memory import LEFT_FREE
from lora_lightning.reports.plan.planned import Kind, Plan

_MEMORY = {
    "weights": "Base weights",
    "gathered": "Shards gathered",
    "adapter": "Adapter",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
    "loss": "Loss, for a moment",
    "backward": "Backward, for a moment",
    "holes": "Allocator's holes, about",
}


def plan_table(plan: Plan) -> RenderableType:
    """All of a plan: layers, what is left out, memory, batch and time."""
    parts: list[RenderableType] = [Text(plan.report.line(), style="italic"), _layers(plan), Text("")]
    if plan.left_out:
        parts += [Text(f"Not adapted: {_listed(plan.left_out)}"), Text("")]
    title = Text(f"Memory of a device ({_where(plan)})", style="italic")
    parts += [title, _memory(plan), Text(""), _facts(plan)]
    parts += [Text(f"Note: {note}") for note in plan.notes]
    return Group(*parts)


def size(number: float | None) -> str:
    """Bytes for people.

    >>> size(19_600_000), size(1.5e9), size(None)
    ('19.6 MB', '1.5 GB', '?')
    """
    if number is None:
        return "?"
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= least:
            return f"{number / least:.3g} {unit}" if number / least < 100 else f"{number / least:,.0f} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds for people.

    >>> duration(50), duration(600), duration(9000)
    ('50 s', '10 min', '2.5 h')
    """
    if seconds is None:
        return "not measured"
    for unit, least in (("days", 2 * 86400), ("h", 7200), ("min", 120)):
        if seconds >= least:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def verdict(plan: Plan) -> str:
    """Whether it fits, in words."""
    if plan.fits is None:
        return "not known: give plan.memory=24GB" if plan.available is None else "not known"
    room = f"{size(plan.available)}, {LEFT_FREE:.0%} of it left free"
    return f"yes, into {room}" if plan.fits else f"no, not into {room}"


def _layers(plan: Plan) -> Table:
    table = Table()
    for heading in (*plan.report.HEADINGS, "share"):
        table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
    whole = max(1, plan.report.trainable_parameters)
    for kind in plan.adapted:
        table.add_row(
            kind.name,
            kind.kind,
            " → ".join(map(str, kind.shape)) or "-",
            str(kind.count),
            str(kind.r) if kind.r else "-",
            f"{kind.scaling:g}" if kind.r else "-",
            f"{kind.parameters:,}",
            f"{kind.parameters / whole:.1%}",
        )
    return table


def _memory(plan: Plan) -> Table:
    numbers = plan.memory.to_dict()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, heading in _MEMORY.items():
        if name != "gathered" or numbers[name]:
            table.add_row(heading, size(numbers[name]))
    table.add_section()
    table.add_row("At least" if plan.memory.activations is None else "At most", size(numbers["total"]), style="bold")
    return table


def _facts(plan: Plan) -> Table:
    setting = plan.setting
    flops, largest = plan.flops_per_token, plan.largest_batch
    lines = {
        "Fits": verdict(plan),
        "Largest batch": "not known" if largest is None else f"{largest:,} rows of {setting.tokens:,} tokens a device",
        "Adapter file": size(plan.file_bytes),
        "Work": "not known" if flops is None else f"{flops / 1e9:.3g} GFLOP a token, forward and backward",
        "Time": f"{duration(plan.seconds_per_1000_steps)} for 1,000 steps, about",
    }
    if plan.seconds_per_1000_steps is None:
        lines["Time"] = "not measured"
    return pairs(lines)


def pairs(lines: dict[str, Any]) -> Table:
    """Two columns: names and what they are."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(str(value)))
    return table


def _where(plan: Plan) -> str:
    setting = plan.setting
    parts = [
        f"{setting.device}, base in {plan.dtype}",
        setting.strategy if setting.devices == 1 else f"{setting.strategy} over {setting.devices}",
        setting.precision,
        f"{setting.rows} × {setting.tokens} tokens",
    ]
    parts += ["checkpointing"] if setting.model.gradient_checkpointing else []
    parts += [setting.model.quantisation] if setting.model.quantisation else []
    return ", ".join(parts)


def _listed(kinds: Iterable[Kind]) -> str:
    return ", ".join(
        f"{kind.name} ({kind.kind}, {' → '.join(map(str, kind.shape))}, {kind.count} of them)" for kind in kinds
    )
