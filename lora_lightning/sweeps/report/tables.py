"""A sweep in rows: for spreadsheets, for reading, for the screen."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_lightning.sweeps.report.collect import Row, Sweep
from lora_lightning.sweeps.report.seeds import Setting, over_seeds
from lora_lightning.sweeps.report.values import is_number, shown

_FIGURE = re.compile(r"[-+]?\d[\d.,e+-]*( ± .*| GiB)?|not finite|none|")  # columns of these stand to the right


def as_csv(sweep: Sweep) -> str:
    """All jobs, one a row: number, state, swept keys, metric, every number of the results, folder, adapter, reasons.

    Missing is empty; a setting that is null says so.
    """
    numbers = {key for row in sweep.rows for key, value in row.result.items() if is_number(value)}
    # A seed stands in the result as well; whatever else a setting and a result both call the same is not the same.
    measured = sorted(numbers - {*sweep.seed_keys}, key=lambda key: (key != sweep.metric, key))
    ends = ["folder", "adapter_path", "ended_by", "same_as", "reason"]
    taken = {"number", "state", sweep.metric, *measured, *ends}
    headings = {key: f"{key} (setting)" if key in taken else key for key in sweep.keys}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["number", "state", *headings.values(), *measured, *ends])
    for row in sweep.rows:
        adapter = final_adapter(row)
        writer.writerow(
            [
                row.number,
                row.state,
                *(_cell(row.settings[key]) if key in row.settings else "" for key in headings),
                *(_number(row.result.get(key)) for key in measured),
                sweep.inside(row.folder),
                "" if adapter is None else sweep.inside(adapter),
                row.result.get("ended_by") or "",
                "" if row.same_as is None else row.same_as,
                "" if row.state in ("finished", "stopped") else row.reason,
            ]
        )
    return file.getvalue()


def as_markdown(sweep: Sweep, pictures: Sequence[str] = ()) -> str:
    """The report for people: what was run, the jobs by their metric, settings over seeds, what has not finished.

    Args:
        sweep: The sweep.
        pictures: Paths of pictures to show, as seen from the report.
    """
    parts = [f"# Sweep {sweep.name}"]
    if sweep.command:
        parts.append(f"```sh\n{command_line(sweep)}\n```")
    parts.append(summary(sweep))
    for section in sections(sweep):
        parts += [f"## {section.title}", *filter(None, [section.note]), _markdown_table(section)]
    if pictures:
        parts.append("## Pictures")
        parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture.replace(' ', '%20')})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def as_table(sweep: Sweep, most: int = 20) -> RenderableType:
    """The same for the screen; of many finished jobs, the best.

    Args:
        sweep: The sweep.
        most: At most so many rows a table; how many more there are is said.
    """
    parts: list[RenderableType] = []
    for section in sections(sweep):
        table = Table(title=section.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        shown_there = [place for place, heading in enumerate(section.headings) if heading != "adapter"]  # too wide
        for place in shown_there:
            right = section.right[place]
            justify: Literal["right", "left"] = "right" if right else "left"
            width = max(len(line[place]) for line in section.lines) if right or place == 0 else None
            table.add_column(section.headings[place], justify=justify, overflow="fold", min_width=width)
        for line in section.lines[:most]:
            cells = (Text(line[place]) for place in shown_there)
            table.add_row(*cells, style="bold green" if line[0] == "best" else "")
        parts.append(table)
        if len(section.lines) > most:
            parts.append(Text(f"… and {len(section.lines) - most} more in sweep.md"))
        parts.append(Text())
    return Group(*parts, Text(summary(sweep)))


def summary(sweep: Sweep) -> str:
    """How many jobs there are in which state, and which is the best."""
    counts = {state: len(sweep.of_state(state)) for state in dict.fromkeys(row.state for row in sweep.rows)}
    words = {"same": "not run since another has its settings", "stopped": "stopped by the sweep"}
    jobs = f"{len(sweep.rows)} job{'s' * (len(sweep.rows) != 1)}"
    text = f"{jobs}: {', '.join(f'{count} {words.get(state, state)}' for state, count in counts.items())}."
    missing = len(sweep.of_state("unfinished", "not started", "interrupted"))
    if missing:
        text += f" {missing} {'are' if missing != 1 else 'is'} missing here: the sweep is still running or was ended."
    best = sweep.best
    if best is not None:
        kind = "higher" if sweep.mode == "max" else "lower"
        label = f" ({sweep.label(best)})" if sweep.label(best) else ""
        value = shown(best.metric, zeros=True)
        text += f" Best by {sweep.metric} ({kind} is better): job {best.number}{label} with {value}."
    return text


def command_line(sweep: Sweep) -> str:
    """What was typed."""
    program = [] if sweep.command[0].startswith("python") else ["python"]
    return shlex.join([*program, *sweep.command])


def final_adapter(row: Row) -> Path | None:
    """The adapter that a job has ended with, also where the sweep's folder was moved; None where there is none."""
    path = Path(row.result.get("adapter_path") or "adapter")
    inside = (row.folder.joinpath(*path.parts[-length:]) for length in range(1, len(path.parts)))
    places = [*inside, row.folder / path]
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


class Section(NamedTuple):
    """A table with its title; every cell a text."""

    title: str
    headings: list[str]
    lines: list[list[str]]
    note: str = ""

    @property
    def right(self) -> list[bool]:
        """Whether each column is one of figures."""
        return [all(map(_FIGURE.fullmatch, column)) for column in zip(*self.lines, strict=True)]


def sections(sweep: Sweep) -> list[Section]:
    """All tables of a report: the finished jobs, settings over seeds, and the others by what became of them."""
    tables = [_jobs(sweep)] if sweep.ranked else []
    if sweep.ranked and sweep.seed_keys and sweep.metric is not None:
        tables.append(_over_seeds(sweep))
    kinds: dict[str, tuple[str, Callable[[Row], bool]]] = {
        "Stopped by the sweep": ("at the metric that they had then", lambda row: row.state == "stopped"),
        "Failed": ("", lambda row: row.state == "failed"),
        "Not finished": ("", lambda row: row.state in ("interrupted", "unfinished", "not started")),
        "Equal settings": ("run once", lambda row: row.state == "same"),
    }
    for title, (note, belongs) in kinds.items():
        if rows := [row for row in sweep.rows if belongs(row)]:
            tables.append(_others(sweep, title, note, rows))
    return tables


def _jobs(sweep: Sweep) -> Section:
    """The finished jobs, the best first; what no job has anything to say of is left out."""
    columns: list[tuple[str, Callable[[Row], str | None]]] = [
        ("", lambda row: "best" if row is sweep.best else None),
        ("job", lambda row: str(row.number)),
        *((sweep.short[key], partial(_setting, key)) for key in sweep.keys),
        *([(sweep.metric, partial(_metric, sweep))] if sweep.metric is not None else []),
        ("trainable parameters", partial(_result, "trainable_parameters", "{:,.0f}", 1.0)),
        ("seconds", partial(_result, "seconds", "{:,.1f}", 1.0)),
        ("peak memory", partial(_result, "peak_memory_bytes", "{:.2f} GiB", 2**-30)),
        ("ended by", lambda row: row.result.get("ended_by")),
        ("adapter", lambda row: None if (path := final_adapter(row)) is None else sweep.inside(path)),
    ]
    filled = [(heading, [cell(row) for row in sweep.ranked]) for heading, cell in columns]
    kept = [(heading, cells) for heading, cells in filled if any(cell is not None for cell in cells)]
    lines = zip(*(cells for _, cells in kept), strict=True)
    shared = [str(row.number) for row in sweep.of_state("finished") if row.result.get("shared_with")]
    note = f"Seconds and memory are those of a process that trained several at once: {', '.join(shared)}."
    cells = [[cell or "" for cell in line] for line in lines]
    return Section("Jobs", [heading for heading, _ in kept], cells, note if shared else "")


def _over_seeds(sweep: Sweep) -> Section:
    """Every setting over its seeds."""
    headings = ["", *(sweep.short[key] for key in sweep.setting_keys), str(sweep.metric), "n", "jobs"]

    def line(rank: int, each: Setting) -> list[str]:
        spread = "" if each.deviation is None else f" ± {each.deviation:.2g}"
        mean = "not finite" if each.mean is None else f"{shown(each.mean, zeros=True)}{spread}"
        values = [shown(each.settings[key]) if key in each.settings else "" for key in sweep.setting_keys]
        best = "best" if rank == 0 and each.mean is not None else ""
        return [best, *values, mean, str(each.values), ", ".join(map(str, each.numbers))]

    settings = over_seeds(sweep)
    return Section(
        f"Settings over {' and '.join(sweep.short[key] for key in sweep.seed_keys)}",
        headings,
        [line(rank, each) for rank, each in enumerate(settings)],
        "Mean ± standard deviation (of a sample, n - 1) over the finished jobs; n of them have a finite value.",
    )


def _others(sweep: Sweep, title: str, note: str, rows: list[Row]) -> Section:
    stopped = title == "Stopped by the sweep" and sweep.metric is not None
    headings = ["job", "settings", *([str(sweep.metric)] if stopped else []), "why"]

    def line(row: Row) -> list[str]:
        why = f"as job {row.same_as}" if row.same_as is not None else row.reason or row.state
        return [str(row.number), sweep.label(row), *([_metric(sweep, row)] if stopped else []), why]

    return Section(title, headings, [line(row) for row in rows], note.capitalize() + "." * bool(note))


def _markdown_table(section: Section) -> str:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    rules = ["---:" if right else "---" for right in section.right]
    marked = [[f"**{line[0]}**", *line[1:]] if line[0] == "best" else line for line in section.lines]
    return "\n".join([row(section.headings), row(rules), *map(row, marked)])


def _setting(key: str, row: Row) -> str:
    return shown(row.settings[key]) if key in row.settings else ""


def _metric(sweep: Sweep, row: Row) -> str:
    if row.metric is not None:
        return shown(row.metric, zeros=True)
    return "not finite" if sweep.metric in row.result else "none"


def _result(key: str, form: str, scale: float, row: Row) -> str | None:
    value = row.result.get(key)
    return None if value is None or not is_number(value) else form.format(value * scale)


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else shown(value)


def _number(value: Any) -> str:
    return repr(value) if is_number(value) else ""
