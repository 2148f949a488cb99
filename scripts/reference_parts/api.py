"""Everything public, from its docstring."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import docstring_parser
from docstring_parser import Docstring, DocstringStyle

from scripts.reference_parts import markdown

MODULES = {
    "lora_lightning": "",
    "lora_lightning.optim": "Optimizers.",
    "lora_lightning.tasks": "LightningModules over transformers models.",
    "lora_lightning.data": "LightningDataModules.",
    "lora_lightning.reports": "What a run tells.",
    "lora_lightning.reports.plan": "What a training would take, before it runs.",
    "lora_lightning.reports.advice": "What a run's figures say about its settings.",
    "lora_lightning.adapters": "Files, beside what `lora_lightning` has itself.",
}


def public() -> dict[str, dict[str, Any]]:
    """Objects by the module that exports them, each once."""
    seen: set[int] = set()
    found: dict[str, dict[str, Any]] = {}
    for module in MODULES:
        home = importlib.import_module(module)
        members = {name: getattr(home, name) for name in sorted(home.__all__, key=str.lower)}
        members = {name: value for name, value in members.items() if callable(value)}
        found[module] = {name: value for name, value in members.items() if id(value) not in seen}
        seen |= {id(value) for value in members.values()}
    return found


def parsed(documented: Any) -> Docstring:
    """A docstring, taken apart."""
    return docstring_parser.parse(inspect.getdoc(documented) or "", DocstringStyle.GOOGLE)


def methods(cls: type) -> dict[str, Any]:
    """What a class adds: its own public methods that override none of a base class."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    functions = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return {
        name: function
        for name, function in functions.items()  # a field's default is a function of another name
        if inspect.isfunction(function) and function.__name__ == name and name not in inherited and name[0] != "_"
    }


def sections() -> str:
    """A section for each module, in it one for each name."""
    parts = []
    for module, members in public().items():
        parts += [f"## {module}", *filter(None, [MODULES[module]])]
        for name, value in members.items():
            parts += [f"### {name}", *_signature(name, value), *_described(value)]
            if inspect.isclass(value):
                rows = [(markdown.code(_called(key, method)), _first(method)) for key, method in methods(value).items()]
                parts += [markdown.table(("method", ""), rows)] if rows else []
    return "\n\n".join(parts)


def _called(name: str, method: Any) -> str:
    line = f"{name}({', '.join(_parameters(method, typed=False)[0])})"
    return line if len(line) <= 48 else f"{name}(…)"  # a column as wide as its longest line would leave no room


def _signature(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    parts, result = _parameters(value, typed=True)
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > 90:
        line = "\n    ".join([f"{name}(", *(f"{part}," for part in parts)]) + f"\n){result}"
    yield f"```text\n{line}\n```"


def _parameters(value: Any, *, typed: bool) -> tuple[list[str], str]:
    """Parameters as they were written, stars among them, and what comes back, with an arrow."""
    parts, starred = [], False
    signature = inspect.signature(value)
    for name, each in signature.parameters.items():
        if name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        stars = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        kind = f": {_kind(each.annotation)}" if typed and each.annotation is not each.empty else ""
        default = "" if each.default is each.empty else (" = " if kind else "=") + _default(each.default)
        parts.append(f"{stars}{name}{kind}{default}")
    returned = signature.return_annotation
    told = typed and not inspect.isclass(value) and returned is not signature.empty
    return parts, f" -> {_kind(returned)}" if told else ""


def _kind(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    return "…" if " at 0x" in repr(value) or "<factory>" in repr(value) else repr(value)


def _first(documented: Any) -> str:
    return markdown.from_docstring(parsed(documented).short_description or "")


def _described(documented: Any) -> Iterator[str]:
    doc = parsed(documented)
    for text in (doc.short_description, doc.long_description):
        if text and (shown := _without_examples(text)):
            yield markdown.from_docstring(shown)
    for title, entries in (
        ("Arguments", [each for each in doc.params if each.args[0] != "attribute"]),
        ("Attributes", [each for each in doc.params if each.args[0] == "attribute"]),
    ):
        if entries:
            rows = [(markdown.code(each.arg_name), markdown.from_docstring(each.description or "")) for each in entries]
            yield markdown.table((title.lower(), ""), rows)
    if doc.returns and doc.returns.description:
        yield f"Returns: {markdown.from_docstring(_line(doc.returns.description))}"
    for error in doc.raises:
        yield f"Raises `{error.type_name}`: {markdown.from_docstring(_line(error.description or ''))}"


def _without_examples(text: str) -> str:
    """Examples are run as doctests where they stand; the page leaves them out."""
    return re.sub(r"^>>>.*?(?:\n\n|\Z)", "", text, flags=re.DOTALL | re.MULTILINE).strip()


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
