"""Markdown from values and from docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    >>> print(table(("key", "means"), [("`a|b`", "<one> | `<b>`")]))
    | key | means |
    | --- | --- |
    | <code>a&#124;b</code> | &lt;one> &#124; `<b>` |
    """
    lines = [columns, ["---"] * len(columns), *([_cell(each) for each in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text between two pipes: those within it are written so that every reader of tables takes them for text."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", text).strip())
    return "".join(part if part[:1] == "`" and "|" not in part else _escaped(part) for part in parts)


def _escaped(part: str) -> str:
    escaped = part.replace("<", "&lt;").replace("|", "&#124;")
    if part[:1] != "`":
        return escaped
    inner = re.sub(r"[\[\]*_\\]", lambda found: f"&#{ord(found[0])};", escaped[1:-1])  # what Markdown would act upon
    return f"<code>{inner}</code>"


def code(value: object) -> str:
    """A value in code marks; nothing for nothing.

    >>> code(0.05), code("")
    ('`0.05`', '')
    """
    return f"`{value}`" if str(value) else ""


def from_docstring(text: str) -> str:
    """Docstring markup as Markdown: roles and double backquotes become code.

    >>> from_docstring("A :class:`LoraConfig` with ``r=16``; see :func:`~lora_lightning.inject_lora`.")
    'A `LoraConfig` with `r=16`; see `inject_lora`.'
    """
    text = re.sub(r":math:`([^`]*)`", lambda found: code(_plain_formula(found[1])), text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _plain_formula(tex: str) -> str:
    return re.sub(r"\s+", " ", tex.replace("\\,", " ").replace("\\|", "‖"))
