"""Advice for people: on the screen, and in ``advice.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lora_lightning.reports.advice.kinds import Advice

_NOTHING = "Nothing in the curves and in the layers asks for another setting."


def advice_table(advice: Sequence[Advice]) -> RenderableType:
    """Advice as it stands under the table at the end of a run.

    Args:
        advice: What :func:`judge` found; nothing is told too.
    """
    table = Table(title="Advice", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for each in advice:
        text = Text(each.sentence)
        if each.override:
            text.append(f"\n{each.override}", style="cyan")
        table.add_row(Text(each.rule.capitalize(), style="yellow" if each.severity == "warning" else ""), text)
    if not advice:
        table.add_row(Text("None"), Text(_NOTHING))
    return table


def as_markdown(advice: Sequence[Advice]) -> str:
    """Advice as a page, with the numbers behind each sentence.

    Args:
        advice: What :func:`judge` found.
    """
    parts = ["# Advice", *([] if advice else [_NOTHING])]
    for each in advice:
        parts += [f"## {each.rule.capitalize()} ({each.severity})", each.sentence]
        if each.override:
            parts += ["Behind the command of this run:", f"```sh\n{each.override}\n```"]
        if each.numbers:
            parts.append(
                "\n".join(f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in each.numbers.items())
            )
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return "not known" if value is None else str(value)
