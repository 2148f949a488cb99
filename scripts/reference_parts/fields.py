"""The fields of LoraConfig, from the dataclass and its docstring."""

from __future__ import annotations

import dataclasses

import docstring_parser

from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import DEFAULTS, OWN
from scripts.reference_parts import markdown


def table() -> str:
    """One row a field: name, type, default, meaning."""
    parsed = docstring_parser.parse(LoraConfig.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    means = {each.arg_name: each.description or "" for each in parsed.params}
    rows = [
        (
            markdown.code(field.name),
            " or ".join(map(markdown.code, str(field.type).split(" | "))),
            markdown.code(repr(_default(field))),
            markdown.from_docstring(means[field.name]),
        )
        for field in dataclasses.fields(LoraConfig)
    ]
    return markdown.table(("field", "type", "default", "meaning"), rows)


def starts() -> str:
    """One row a setting of the starts that have some."""
    rows = [
        (
            markdown.code(f"{start}_config"),
            markdown.code(name),
            markdown.code(repr(value)),
            "our own" if name in OWN else "PEFT's",
        )
        for start, settings in DEFAULTS.items()
        for name, value in settings.items()
    ]
    return markdown.table(("field", "setting", "default", "name is"), rows)


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
