"""The sections of a model card: what came out, what it writes, how it was trained, and where."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_lightning.reports.page.figures import facts, measured
from lora_lightning.reports.page.folder import Run, pairs_of
from lora_lightning.reports.page.settings import what_matters
from lora_lightning.reports.texts import printable

_MOST_SAMPLES, _LONGEST = 5, 300
# What readers of Markdown act upon, of CommonMark and beyond: tables, formulas, bare addresses.
_MARKUP = re.compile(r"[\\`*~\[\]<&|$@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/|(?<=www)\.", re.IGNORECASE)


def figures(run: Run | None, *, at_the_end: bool) -> list[str]:
    """What came out, and what it took.

    Args:
        run: The run; None where none is known, as of all that follow.
        at_the_end: Whether the card is of the adapter that the training ended with.
    """
    if run is None:
        return []
    rows = [(each.label, each.before or "", each.value, each.change) for each in measured(run)]
    parts = ["## What came out", table(("", "before training", "after", "change"), rows)] if rows else []
    if rows and not at_the_end:
        parts.append("These figures are of the adapter that the training ended with, not of this one.")
    if run.status != "finished":
        parts.append(f"The training has not finished: its status is {run.status}.")
    took = [
        f"{each.label.lower()} {each.value}" + (f" ({each.note})" if each.note else "")
        for each in facts(run)
        if each.label != "Adapter"
    ]
    return [*parts, f"What it took: {', '.join(took)}."] if took else parts


def samples(run: Run | None) -> list[str]:
    """What the model wrote to the same prompts before and after."""
    if run is None or not run.samples:
        return []
    first, last = run.samples[0], run.samples[-1]
    rows = [
        (now.get("prompt"), before, now.get("written") or "(nothing)", now.get("reference"))
        for before, now in pairs_of(first, last)[:_MOST_SAMPLES]
    ]
    return ["## What it writes", table(("prompt", "before", "after", "reference"), rows)] if rows else []


def settings(run: Run | None) -> list[str]:
    """How it was trained, what matters first."""
    if run is None or not run.config:
        return []
    overrides = [str(each) for each in run.result.get("overrides") or run.about.get("overrides") or ()]
    rows = [
        (group.title if number == 0 else "", setting.key, public(setting.value))
        for group in what_matters(run.config, overrides)
        for number, setting in enumerate(group.settings)
    ]
    return ["## How it was trained", table(("", "setting", "value"), rows)] if rows else []


def environment(run: Run | None) -> list[str]:
    """Device and versions."""
    known = {} if run is None else run.about.get("environment") or {}
    return ["## Environment", table(("", ""), list(known.items()))] if known else []


def node(run: Run | None, name: str) -> Mapping[str, Any]:
    """A part of a run's settings; empty where there is none."""
    found = run.config.get(name) if run is not None else None
    return found if isinstance(found, Mapping) else {}


def public(text: str) -> str:
    """A path without the folders of the machine it was on.

    >>> public("/home/me/rows.jsonl"), public("owner/name")
    ('rows.jsonl', 'owner/name')
    """
    return os.path.basename(text.rstrip("/")) if os.path.isabs(text) else text


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""A table in Markdown.

    >>> print(table(("a", "b"), [(1, None), ("*", "two\nlines")]))
    | a | b |
    | --- | --- |
    | 1 |  |
    | &#42; | two lines |
    """
    lines = [headings, ["---"] * len(headings), *([_cell(each) for each in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A text in one line, in which nothing is markup: it may be a model's, or of anybody's data."""
    text = " ".join(printable(str("" if value is None else value)).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
