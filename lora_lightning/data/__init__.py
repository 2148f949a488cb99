"""Data modules: the BBC stories, the user's own rows and synthetic text, from file to padded batch.

The way of a row: :mod:`sources` reads it and remembers where it stood, :mod:`formats` brings it into canonical form,
:mod:`chat` renders it through the chat template and says which characters are trained, :mod:`encode` turns it into
tokens and labels, and :mod:`samplers` and :mod:`loaders`, or :mod:`packing`, deal it out in batches. In between,
:mod:`cache` may keep it on disk, in the arrays of :mod:`flat`.

Names are imported when they are first used: what they need (Lightning, transformers) is slow to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["BBCHeadlines", "BBCTopics", "DataModule", "SamplePrompt", "TextData", "TinyText"]

_HOMES = {
    "BBCHeadlines": "bbc",
    "BBCTopics": "bbc",
    "DataModule": "module",
    "SamplePrompt": "module",
    "TextData": "text",
    "TinyText": "tiny",
}

if TYPE_CHECKING:
    from lora_lightning.data.bbc import BBCHeadlines, BBCTopics
    from lora_lightning.data.module import DataModule, SamplePrompt
    from lora_lightning.data.text import TextData
    from lora_lightning.data.tiny import TinyText


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
