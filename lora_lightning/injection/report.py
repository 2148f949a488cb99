"""What injection did, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoraRow:
    """One adapted layer (or one module trained in full, which has neither rank nor scale).

    Attributes:
        name: Canonical name below the root.
        kind: Kind of layer: ``Linear``, ``Conv1D``, ``Embedding``, ``Conv``, ``MultiheadAttention``; ``in full`` or
            ``bias`` where there is no rank.
        shape: ``(in, out)`` of the layer.
        r: Rank, 0 where trained in full.
        scaling: The scale ``s`` of the update.
        parameters: How many parameters train here.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    r: int
    scaling: float
    parameters: int


@dataclass(frozen=True)
class LoraReport:
    """The layers that are adapted, and what they weigh. Prints as a table, in notebooks too.

    Attributes:
        rows: One for each adapted layer and each module trained in full.
        trainable_parameters: Parameters that train.
        total_parameters: Parameters of the model with its adapter.
        frozen_heads: Modules that injection froze although they look meant to train (a fresh head, or what was left
            trainable in a frozen model); ``modules_to_save`` trains them.
    """

    rows: list[LoraRow]
    trainable_parameters: int
    total_parameters: int
    frozen_heads: tuple[str, ...] = ()

    @property
    def trainable_share(self) -> float:
        """Trainable of all parameters, between 0 and 1."""
        return self.trainable_parameters / max(self.total_parameters, 1)

    def facts(self, prefix: str = "") -> dict[str, Any]:
        """The report in a few numbers, for loggers: counts, share, ranks and scales.

        Args:
            prefix: Stands between ``lora/`` and the name of each.
        """
        adapted = [row for row in self.rows if row.r]
        return {
            f"lora/{prefix}layers": len(adapted),
            f"lora/{prefix}trainable_parameters": self.trainable_parameters,
            f"lora/{prefix}total_parameters": self.total_parameters,
            f"lora/{prefix}trainable_share": self.trainable_share,
            f"lora/{prefix}r": _one_or_range([row.r for row in adapted]),
            f"lora/{prefix}scaling": _one_or_range([row.scaling for row in adapted]),
        }

    def line(self) -> str:
        """The report in one line."""
        adapted = [row for row in self.rows if row.r]
        ranks = _one_or_range([row.r for row in adapted])
        scales = _one_or_range([row.scaling for row in adapted])
        in_full = [row.name for row in self.rows if row.kind == "in full"]
        return (
            f"LoRA: {len(adapted)} layers adapted, r={ranks}, scale {scales}; "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
            f"({self.trainable_share:.2%})" + (f"; in full: {', '.join(in_full)}" if in_full else "")
        )

    def summary(self) -> list[tuple[str, ...]]:
        """Rows of one table for people: layers of one name, kind, shape, rank and scale counted together."""
        groups: Counter[tuple] = Counter()
        parameters: Counter[tuple] = Counter()
        for row in self.rows:
            key = (row.name.rpartition(".")[2] or "(model)", row.kind, row.shape, row.r, row.scaling)
            groups[key] += 1
            parameters[key] += row.parameters
        return [
            (
                name,
                kind,
                " → ".join(map(str, shape)) or "-",
                str(groups[key]),
                str(r) if r else "-",
                f"{scaling:g}" if r else "-",
                f"{parameters[key]:,}",
            )
            for key in groups
            for name, kind, shape, r, scaling in [key]
        ]

    HEADINGS = ("layer", "kind", "in → out", "count", "r", "scale", "parameters")

    def __rich__(self) -> Any:
        """The table, under the report in one line."""
        return self.table(self.line())

    def table(self, title: str) -> Any:
        """A rich table with a line for all layers that are alike.

        Args:
            title: Stands over it.
        """
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for heading in self.HEADINGS:
            table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
        for row in self.summary():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(width=110, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.summary())
        return f"<p><b>{escape(self.line())}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _one_or_range(values: list[int] | list[float]) -> Any:
    distinct = sorted(set(values))
    if len(distinct) <= 1:
        return distinct[0] if distinct else 0
    return f"{distinct[0]:g} to {distinct[-1]:g}"
