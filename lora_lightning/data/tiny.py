"""Text made by code: something to learn for the smallest of models, with no download."""

from __future__ import annotations

import random
from collections import Counter

from typing_extensions import Unpack

from lora_lightning.data.chats import ChatDataModule, ChatOptions
from lora_lightning.data.encode import Tally
from lora_lightning.data.formats import Record

_COLOURS = ("red", "green", "blue", "white", "black", "grey")
_THINGS = (
    "ball", "boat", "bird", "book", "chair", "clock", "coat", "cup", "door", "fish",
    "hat", "house", "kite", "lamp", "leaf", "moon", "ring", "rose", "shoe", "train",
)  # fmt: skip
_ASKED = ("What colour is the {thing}?", "Tell me the colour of the {thing}.", "The {thing} has which colour?")


class TinyText(ChatDataModule):
    """Questions about the colours of things. The seed says which thing has which colour.

    Args:
        rows: For training.
        val_rows: For validation, about the same things.
        **options: Those of :class:`~lora_lightning.data.module.ChatDataModule`.
    """

    def __init__(self, *, rows: int = 256, val_rows: int = 32, **options: Unpack[ChatOptions]) -> None:
        super().__init__(**options)
        self.rows = rows
        self.val_rows = val_rows

    def content(self) -> object:
        """Nothing: the options say it all."""
        return None

    def records(self) -> tuple[list[Record], list[Record], Tally, Tally]:
        """Makes the rows."""
        chance = random.Random(f"tiny text/{self.seed}")
        colours = {thing: chance.choice(_COLOURS) for thing in _THINGS}
        records = []
        for number in range(self.rows + self.val_rows):
            thing = chance.choice(_THINGS)
            asked = {"role": "user", "content": chance.choice(_ASKED).format(thing=thing)}
            answer = {"role": "assistant", "content": f"The {thing} is {colours[thing]}."}
            records.append(Record(f"made row {number + 1}", (asked, answer), 1))
        train, val = records[: self.rows], records[self.rows :]
        return train, val, Tally(len(train), Counter({"text made by code": len(train)})), Tally(len(val))
