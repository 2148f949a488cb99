"""Puts the figures of benchmarks/results/ into docs/performance.md.

    python benchmarks/page.py

Each part lies between two marks, ``<!-- targets -->`` and ``<!-- end of targets -->``; what stands outside of them is
written by hand and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("what", "figure", "quartiles", "target", "reached", "beside")
NOT_RUN = "*Not run yet.*"
MB = 2**20


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text, in the order of `COLUMNS`."""
    figure, target, unit = row["figure"], row["target"], row["unit"]
    several = figure["n"] > 1
    return [
        row["what"],
        _number(figure["median"], unit),
        f"{_number(figure['low'])} to {_number(figure['high'])}" if several else "",
        f"≤ {target:g}{_unit(unit)}" if target else "",
        ("yes" if figure["median"] <= target else "no") if target else "",
        row["note"],
    ]


def _number(value: float, unit: str = "×") -> str:
    return f"{value:.3f}{_unit(unit)}"


def _unit(unit: str) -> str:
    return "" if unit == "×" else f" {unit}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns that hold nothing are left out."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---- what lies between the marks


def about(cpu: dict[str, Any]) -> str:
    """The machine, in a sentence."""
    machine = cpu["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning", "peft"))
    weights = "real weights" if machine["real_weights"] else "random weights"
    minutes = sum(told["minutes"] for told in cpu["sections"].values())
    worst = max((told["error"] for told in cpu["checks"]), default=float("nan"))
    return (
        f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores; {versions}, Python "
        f"{machine['python']}; {machine['date']}. SmolLM2-135M with {weights}, {machine['rounds']} turns of each "
        f"contender, {minutes:.0f} minutes in all. {len(cpu['checks'])} sets of gradients were compared with float64 "
        f"before; the largest relative distance was {worst:.1e}."
    )


def targets(cpu: dict[str, Any]) -> str:
    """What was to be reached, and what was."""
    rows = [row for told in cpu["sections"].values() for row in told["rows"] if row["target"]]
    return markdown(COLUMNS, [cells(row) for row in rows]) + _missing(cpu)


def _missing(cpu: dict[str, Any]) -> str:
    lines = [
        f"- {name} ({section}): {reason}"
        for section, told in cpu["sections"].items()
        for name, reason in told.get("not_run", {}).items()
    ]
    return "\n\nNot run:\n\n" + "\n".join(lines) if lines else ""


def others(cpu: dict[str, Any]) -> str:
    """Figures without a target."""
    rows = [row for told in cpu["sections"].values() for row in told["rows"] if not row["target"]]
    return markdown(COLUMNS, [cells(row) for row in rows])


def ladder(cpu: dict[str, Any]) -> str:
    """What each level brings."""
    levels = cpu["sections"].get("headlines", {}).get("ladder")
    if not levels:
        return NOT_RUN
    rows = []
    for level in levels:
        before = level["against_before"]
        shipped = level["against_shipped"]
        quartiles = "" if before is None else f"{before['low']:.3f} to {before['high']:.3f}"
        step = "" if before is None else f"{before['median']:.3f}"
        rows.append([level["level"], f"{shipped['median']:.3f}", step, quartiles, f"{level['tokens_per_second']:,}"])
    return markdown(("level", "against PEFT as shipped", "against what it adds to", "quartiles", "tokens/s"), rows)


def speeds(cpu: dict[str, Any]) -> str:
    """Tokens a second of all contenders, by task."""
    told = {
        "SmolLM2-135M, 4×128, every token supervised": cpu["sections"].get("step", {}).get("step"),
        "headlines of whole stories": cpu["sections"].get("stories", {}).get("stories"),
        "DoRA, 4×128": cpu["sections"].get("dora", {}).get("dora"),
        **cpu["sections"].get("shapes", {}).get("shapes", {}),
    }
    rows = [
        [task, name, f"{one['tokens_per_second']:,}"]
        for task, contenders in told.items()
        for name, one in (contenders or {}).items()
    ]
    return markdown(("task", "contender", "tokens/s"), rows) if rows else NOT_RUN


def profiles(cpu: dict[str, Any]) -> str:
    """Where the time of a step goes."""
    return _profiles(cpu["sections"].get("step", {}).get("profiles"))


def _profiles(told: dict[str, Any] | None) -> str:
    if not told:
        return NOT_RUN
    parts = []
    for name, one in told.items():
        rows = [
            [f"`{op['op']}`" if op["op"] != "other" else "other", f"{op['share']:.1%}", f"{op['calls']:,}"]
            for op in one["ops"]
        ]
        seconds = f"{1000 * one['seconds']:,.0f} ms under the profiler"
        parts.append(f"**{name}**, {seconds}:\n\n{markdown(('operation', 'share', 'calls'), rows)}")
    return "\n\n".join(parts)


def cuda(told: dict[str, Any]) -> str:
    """The rows of a run on a GPU."""
    machine = told["machine"]
    versions = ", ".join(f"{name} {machine[name] or 'not there'}" for name in ("torch", "transformers", "peft"))
    check = "right" if told.get("check", {}).get("right") else "WRONG"
    head = f"{machine.get('gpu', 'no GPU')}; {versions}; {machine['date']}. Gradients against float64: {check}."
    pairs = [
        [
            row["title"],
            f"{pair['of']} / {pair['against']}",
            f"{pair['time']['median']:.3f}",
            f"{pair['time']['low']:.3f} to {pair['time']['high']:.3f}",
            f"≤ {pair['time_target']}" if pair["time_target"] else "",
            f"{pair['memory']:.3f}" if pair["memory"] else "",
            f"≤ {pair['memory_target']}" if pair["memory_target"] else "",
        ]
        for row in told["rows"]
        for pair in row.get("ratios", [])
    ]
    table = markdown(("task", "who against whom", "time", "quartiles", "target", "memory", "target"), pairs)
    single = [
        [
            row["title"],
            name,
            one.get("not_run") or f"{1000 * one['seconds']['median']:.1f} ms",
            f"{one['tokens_per_second']:,}" if "tokens_per_second" in one else "",
            f"{one['memory'] / MB:,.0f}" if "memory" in one else "",
        ]
        for row in told["rows"]
        for name, one in row["contenders"].items()
        if "seconds" in one or "not_run" in one
    ]
    each = markdown(("task", "contender", "step", "tokens/s", "peak MB"), single)
    found = {
        name: one["profile"] for row in told["rows"] for name, one in row["contenders"].items() if "profile" in one
    }
    begun = f"\n\nNot begun when the time was up: {'; '.join(told['not_begun'])}." if told.get("not_begun") else ""
    parts = [f"{head}{begun}", table, each]
    if found:
        parts.append("Where the time of the 1B step goes, by kernels:\n\n" + _profiles(found))
    return "\n\n".join(parts)


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "about": ("cpu", about),
    "targets": ("cpu", targets),
    "ladder": ("cpu", ladder),
    "others": ("cpu", others),
    "speeds": ("cpu", speeds),
    "profiles": ("cpu", profiles),
    "cuda": ("cuda", cuda),
}


def fill(text: str, name: str, part: str) -> str:
    """Put a part between its marks.

    Raises:
        RuntimeError: The text has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise RuntimeError(f"The page has no marks {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{part}\n{end}", text)


def write(document: Path = DOCUMENT, results: Path = RESULTS) -> None:
    """Fill every part for which there are results."""
    text = document.read_text(encoding="utf-8")
    for name, (source, render) in PARTS.items():
        file = results / f"{source}.json"
        part = render(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else NOT_RUN
        text = fill(text, name, part)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
