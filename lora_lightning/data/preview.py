"""What a run is about to train on, for people: an example with its trained tokens marked, and the count of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.encode import IGNORED, Example, Tally

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained, so that it is seen without colours too."""
SHOWN = 600
"""Characters of a stretch of text; a longer one is shortened in its middle."""


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """An example decoded from its tokens, the trained ones between ⟦ and ⟧ and in colour."""
    text = Text()
    tokens = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        words = _shortened(str(tokenizer.decode([token for token, _ in run])))
        text.append(f"{OPEN}{words}{CLOSE}" if trained else words, style="bold green" if trained else "dim")
    return text


def summary(tallies: Mapping[str, Tally], notes: Sequence[str], example: RenderableType, title: str) -> RenderableType:
    """The counts of all parts of the data, what is to be said about them, and an example.

    Args:
        tallies: By part: ``{"train": …, "validation": …}``.
        notes: Sentences.
        example: What :func:`marked` makes.
        title: Stands over the example.
    """
    table = Table("rows", *tallies, title="Data", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    counts: dict[str, list[int]] = {
        "read": [tally.rows for tally in tallies.values()],
        "dropped: bad": [tally.bad for tally in tallies.values()],
        "dropped: cut off before the answer": [tally.unanswered for tally in tallies.values()],
        "added: the template rewrites earlier turns": [tally.rewritten for tally in tallies.values()],
        "examples": [tally.examples for tally in tallies.values()],
        "of these cut at max_length": [tally.cut for tally in tallies.values()],
        "tokens": [tally.tokens for tally in tallies.values()],
        "of these trained": [tally.trained for tally in tallies.values()],
    }
    for name, numbers in counts.items():
        if any(numbers) or name in {"read", "examples"}:
            table.add_row(name, *(f"{number:,}" for number in numbers))
    formats = [
        f"{number:,} rows read as {name}." for tally in tallies.values() for name, number in tally.formats.items()
    ]
    bad = [f"Bad rows ({part}):\n  {tally.shown()}" for part, tally in tallies.items() if tally.bad]
    return Group(table, *map(Text, [*formats, *bad, *notes]), Panel(example, title=title, title_align="left"))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
