"""A run, read from its folder alone: whatever of it is there."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_lightning.reports.curves import Points, joined, parts_of
from lora_lightning.reports.insight.rows import InsightRow, read_rows

ABOUT, RESULT, METRICS, CONFIG, SAMPLES = "about.json", "result.json", "metrics.csv", "config.yaml", "samples.jsonl"
INSIGHT, ADVICE, PROGRESS = "insight.csv", "advice.md", "progress.json"
_MARKS = (RESULT, METRICS, CONFIG, ABOUT)  # by any of these a run's folder is known
_NO_CURVE = {"step", "epoch"}


@dataclass(frozen=True)
class Run:
    """What a run has left so far.

    Attributes:
        folder: Its folder; absolute.
        result: ``result.json``; empty while there is none.
        about: ``about.json``; empty for a run of before there was one.
        config: ``config.yaml`` as plain values; empty where it cannot be read.
        config_text: The same as it stands there.
        curves: By column of the metrics: what was measured over the steps.
        samples: What the model wrote, by time: ``title``, ``step``, ``samples``.
        insight: The rows of ``insight.csv``.
        trouble: What could not be read, in words.
    """

    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    curves: dict[str, Points] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    insight: list[InsightRow] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @cached_property
    def status(self) -> str:
        """``finished``, ``interrupted``, ``failed``, or ``unfinished`` while there is no result."""
        status = self.result.get("status")
        return status if status in ("finished", "interrupted", "failed") else "unfinished"

    @cached_property
    def steps(self) -> int:
        """Optimizer steps that are known to be done."""
        measured = max((points[-1][0] for points in self.curves.values() if points), default=0)
        known = self.result.get("steps")
        return int(known) if isinstance(known, (int, float)) else measured

    @cached_property
    def planned_steps(self) -> int | None:
        """Optimizer steps that were to be done, where that is known."""
        told = self.about.get("planned_steps") or (self.config.get("trainer") or {}).get("max_steps")
        return int(told) if isinstance(told, (int, float)) and told > 0 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in _MARKS)


def read_run(folder: Path) -> Run:
    """Read whatever a run has left in its folder; what is broken off is left out and told in ``trouble``."""
    folder = folder.absolute()
    trouble: list[str] = []

    def readable(name: str, read: Any, otherwise: Any) -> Any:
        path = folder / name
        if not path.is_file():
            return otherwise
        try:
            return read(path)
        except Exception as error:  # of any of the formats: a page of the rest is better than none
            trouble.append(f"{name} cannot be read: {error}")
            return otherwise

    return Run(
        folder=folder,
        result=readable(RESULT, _mapping, {}),
        about=readable(ABOUT, _mapping, {}),
        config=readable(CONFIG, _settings, {}),
        config_text=readable(CONFIG, lambda path: path.read_text(encoding="utf-8"), ""),
        curves=readable(METRICS, _curves, {}),
        samples=readable(SAMPLES, _lines, []),
        insight=readable(INSIGHT, read_rows, []),
        trouble=trouble,
    )


def _mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a mapping is expected, got {type(content).__name__}")
    return content


def _settings(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content if isinstance(content, dict) else {}


def _curves(path: Path) -> dict[str, Points]:
    files = parts_of(path)
    columns: dict[str, None] = {}
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            columns |= dict.fromkeys(next(csv.reader(lines), []))
    names = [name for name in columns if name and name not in _NO_CURVE]
    curves = joined(files, *names) if "step" in columns else []
    return {name: points for name, points in zip(names, curves, strict=False) if points}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may be half written."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [each for each in found if isinstance(each, dict)]


def pairs_of(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[Any, Mapping[str, Any]]]:
    """For each sample of a time what was written first, and the sample now.

    By place, as long as the prompts are the same: shortened ones that begin alike cannot be told apart by their text.
    """
    earlier, now = list(first.get("samples", ())), list(last.get("samples", ()))
    if [each.get("prompt") for each in earlier] != [each.get("prompt") for each in now]:
        by_prompt = {each.get("prompt"): each for each in earlier}
        earlier = [by_prompt.get(each.get("prompt"), {}) for each in now]
    return [(old.get("written"), new) for old, new in zip(earlier, now, strict=True)]
