"""Puts the figures of benchmarks/results/packed.json into docs/sweeps.md, between ``<!-- packed -->`` and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.page import MB, NOT_RUN, ROOT, fill, markdown

DOCUMENT = ROOT / "docs" / "sweeps.md"
RESULTS = ROOT / "benchmarks" / "results" / "packed.json"
NAMES = {
    "serial": "one after another",
    "two": "two at a time, one thread each",
    "all": "all at once, a process each",
    "packed": "packed",
    "halving": "packed, worse half stopped at each rung",
}
COLUMNS = ("", "whole sweep", "against one after another", "target", "memory", "against all at once",
           "resident", "against all at once", "target", "loss: farthest from solo", "best job")  # fmt: skip
TIME = {("1x48", "packed"): 0.5, ("4x96", "packed"): 0.75, ("1x48", "halving"): 0.35, ("4x96", "halving"): 0.35}
MEMORY = {"packed": 0.3, "halving": 0.3}


def table(results: dict[str, Any]) -> str:
    """A table for each size of a step."""
    return "\n\n".join(_of_rows(rows, told) for rows, told in results["rows"].items())


def _of_rows(rows: str, told: dict[str, Any]) -> str:
    cases = told["cases"]
    lines = [_line(rows, case, cases) for case in NAMES if case in cases]
    head = f"{told['jobs']} jobs, {rows.replace('x', ' × ')} tokens a step" if "x" in rows else f"{told['jobs']} jobs"
    return f"{head}:\n\n{markdown(COLUMNS, lines)}"


def _line(rows: str, case: str, cases: dict[str, Any]) -> list[str]:
    one, serial, whole = cases[case], cases.get("serial"), cases.get("all")
    time_target, memory_target = TIME.get((rows, case)), MEMORY.get(case)
    apart = one.get("difference") if case != "serial" else None
    return [
        NAMES[case],
        f"{one['seconds']:.0f} s",
        f"{one['seconds'] / serial['seconds']:.2f}" if serial and case != "serial" else "",
        f"≤ {time_target:g}" if time_target else "",
        *_memory("pss", one, whole),
        *_memory("rss", one, whole),
        f"≤ {memory_target:g}" if memory_target else "",
        f"{apart:.1e}" if apart is not None else "",
        _best(one),
    ]


def _memory(kind: str, one: dict[str, Any], whole: dict[str, Any] | None) -> tuple[str, str]:
    """At its highest, and against a process for each job."""
    told = f"{one['memory'][kind] / MB:,.0f} MB"
    return told, f"{one['memory'][kind] / whole['memory'][kind]:.2f}" if whole and one is not whole else ""


def _best(one: dict[str, Any]) -> str:
    job = one["jobs"].get(one["best"] or "")
    if job is None:
        return ""
    everywhere = set.intersection(*(set(each["overrides"]) for each in one["jobs"].values()))
    own = " ".join(each for each in job["overrides"] if each not in everywhere)
    return f"{own}: {job['val_loss']:.4f}"


def about(results: dict[str, Any]) -> str:
    """The machine, in a sentence."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning"))
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {versions}, Python {machine['python']}; {machine['date']}. "
        "Whole sweeps of 20 steps each from the command line to its end, processes included. Memory is that of all "
        "processes together at its highest, with a page that several share counted once (PSS), and in each of them "
        "(resident)."
    )


def write(document: Path = DOCUMENT, results: Path = RESULTS) -> None:
    """Fill the part."""
    told = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    part = NOT_RUN if told is None else f"{about(told)}\n\n{table(told)}"
    document.write_text(fill(document.read_text(encoding="utf-8"), "packed", part), encoding="utf-8")
