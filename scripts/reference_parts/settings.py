"""The settings of the command line: every key of conf/ with its default and its comment, as the YAML has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from scripts.reference_parts import markdown

CONF = Path(__file__).resolve().parents[2] / "lora_lightning" / "conf"
PRESETS = CONF.parent / "presets"
_ELSEWHERE = ("lora",)  # the fields of LoraConfig, which have a table of their own
_HYDRAS = ("defaults", "_partial_", "_recursive_", "_convert_")
# What one meets first comes first; the rest follows by name.
_ORDER = ("model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "experiment")


class Key(NamedTuple):
    """A key of a file, dotted, its value as it is written there, and its comment."""

    name: str
    value: str
    comment: str


class File:
    """One YAML file: the comment that it begins with, what it builds on, and its keys.

    Args:
        path: Where it lies.
    """

    def __init__(self, path: Path) -> None:
        self._text = path.read_text(encoding="utf-8")
        self._lines = self._text.splitlines()
        self._root = yaml.compose(self._text)
        self._header = 0
        while self._header < len(self._lines) and self._lines[self._header].startswith("#"):
            self._header += 1

    @property
    def about(self) -> str:
        """The comment at its top."""
        lines = (line.lstrip("# ") for line in self._lines[: self._header])
        return " ".join(line for line in lines if not line.startswith("@package"))

    @property
    def builds_on(self) -> list[str]:
        """The files of the same group that its defaults name."""
        named = (yaml.safe_load(self._text) or {}).get("defaults", [])
        return [each for each in named if isinstance(each, str) and each != "_self_"]

    def entries(self) -> list[Key]:
        """Its keys, those of tables within it dotted."""
        return [] if self._root is None else list(self._walk(self._root, ""))

    def _walk(self, mapping: yaml.MappingNode, prefix: str) -> Iterator[Key]:
        for key, value in mapping.value:
            if key.value in _HYDRAS:
                continue
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
                if comment := self._comment(key, key):
                    yield Key(name, "", comment)
                yield from self._walk(value, f"{name}.")
            else:
                written = self._text[value.start_mark.index : value.end_mark.index].replace("\\\n", "").strip()
                if isinstance(value, yaml.SequenceNode) and not value.flow_style:
                    written = re.sub(r"\s+# .*", "", written)
                yield Key(name, written, self._comment(key, value))

    def _comment(self, key: yaml.Node, last: yaml.Node) -> str:
        """What stands behind a key and its value, else in the lines right above."""
        nested = isinstance(last, yaml.SequenceNode) and not last.flow_style
        end = (key if nested else last).end_mark
        behind = self._lines[end.line][end.column :].partition("# ")[2]
        if behind:
            return behind.strip()
        above: list[str] = []
        line = key.start_mark.line - 1
        while line >= self._header and self._lines[line].strip().startswith("# "):
            above.insert(0, self._lines[line].strip().lstrip("# "))
            line -= 1
        return " ".join(above)


def sections() -> str:
    """The keys of train.yaml, then a section for each group of settings with all its choices."""
    own = ["### Every run", _table(File(CONF / "train.yaml").entries())]
    for path in sorted(set(CONF.glob("*.yaml")) - {CONF / "train.yaml"}):
        keys = [key for key in File(path).entries() if not key.name.startswith("hydra")]
        own += [f"`{path.stem}` has besides:", _table(keys)] if keys else []
    return "\n\n".join([*own, *(part for group in _groups() for part in _group(group))])


def _groups() -> list[Path]:
    """All folders with settings, those of nested groups too."""
    found = {
        path.parent
        for place in (CONF, PRESETS / "hydra")
        for path in place.rglob("*.yaml")
        if path.parent not in (CONF, CONF / "lora")
    }
    return sorted(found, key=lambda folder: (_rank(_name(folder)), _name(folder), str(folder)))


def _name(folder: Path) -> str:
    return str(folder.relative_to(PRESETS if folder.is_relative_to(PRESETS) else CONF))


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _group(folder: Path) -> Iterator[str]:
    name = _name(folder)
    yield f"### {name}" + (" (in any Hydra app)" if folder.is_relative_to(PRESETS) else "")
    for path in sorted(folder.glob("*.yaml"), key=lambda path: (not path.stem.startswith("_"), path.stem)):
        file = File(path)
        yield f"#### {name} ({path.stem})" if path.stem.startswith("_") else f"#### {name}={path.stem}"
        on = ", ".join(f"`{other}`" for other in file.builds_on)
        if about := " ".join(part for part in (file.about, f"Builds on {on}." if on else "") if part):
            yield about
        if keys := file.entries():
            yield _table(keys)


def _table(keys: list[Key]) -> str:
    rows = [(markdown.code(key.name), markdown.code(key.value), key.comment) for key in keys]
    return markdown.table(("key", "value", ""), rows)
