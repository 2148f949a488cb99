"""What a data module holds once it is set up."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_lightning.data.encode import Example, Tally
from lora_lightning.data.loaders import Rows
from lora_lightning.data.stream import RowStream


@dataclass(frozen=True)
class SamplePrompt:
    """A fixed prompt that a model answers before, during and after training, so that people see it learn.

    Attributes:
        prompt: What the model is fed: rendered, special tokens and generation prompt included (add none when
            tokenising).
        shown: The same in short, for people.
        reference: The right answer.
    """

    prompt: str
    shown: str
    reference: str | None = None


@dataclass
class Loaded:
    """Rows, and what is told of them."""

    train: Rows | RowStream
    validation: Rows
    shown: Example
    """The example that is shown to people."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompts: list[SamplePrompt] = field(default_factory=list)
