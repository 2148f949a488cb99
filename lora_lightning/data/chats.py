"""Data modules for causal language models: conversations and plain text."""

from __future__ import annotations

import re
import textwrap
from abc import abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from lora_lightning.data.chat import TRAIN_ON, ChatRenderer, install_template
from lora_lightning.data.encode import Encoder, Example, Tally
from lora_lightning.data.formats import Record, answers
from lora_lightning.data.loaders import Rows
from lora_lightning.data.module import DataModule, Loaded, Options, SamplePrompt
from lora_lightning.errors import LoraConfigError, did_you_mean


class ChatOptions(Options, total=False):
    """Options of data modules for causal language models; :class:`ChatDataModule` describes them."""

    train_on: str
    system_prompt: str | None
    chat_template: str | None
    packing: bool


class ChatDataModule(DataModule):
    """A data module for causal language models: conversations or plain text, that :meth:`records` brings.

    Args:
        train_on: ``"completion"`` (of prompt/completion and alpaca rows; of conversations every turn of the assistant),
            ``"assistant"`` (its every turn), ``"last"`` (its last turn) or ``"all"`` (every token). Of plain text every
            token is trained.
        system_prompt: Takes the place of the rows' system message; None leaves rows as they are.
        chat_template: A template or the path of a ``.jinja`` file; None takes the tokenizer's own, or a default.
        packing: Train on rows of several examples each, filled up to ``max_length``; ``batch_size`` counts such rows.
        **options: Those of :class:`DataModule`.

    Raises:
        LoraConfigError: If an option makes no sense.
    """

    def __init__(
        self,
        *,
        train_on: str = "completion",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        packing: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        if train_on not in TRAIN_ON:
            raise LoraConfigError(
                f"train_on={train_on!r} is none of {', '.join(TRAIN_ON)}{did_you_mean(str(train_on), TRAIN_ON)}."
            )
        self.train_on = train_on
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.packing = packing
        self.on_bad_row = "drop"
        self._template_notes: list[str] | None = None

    @abstractmethod
    def records(self) -> tuple[list[Record], list[Record], Tally, Tally]:
        """The rows for training and for validation, and the tallies of both."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Loaded:
        """Renders and tokenises the records.

        Raises:
            LoraConfigError: If too many rows are bad, or nothing is left to train.
        """
        encoder, notes = self.encoder(tokenizer)
        train_records, val_records, train, val = self.records()
        examples = self.encode(encoder, train_records, train, "training")
        return Loaded(
            train=Rows(examples),
            validation=Rows(self.encode(encoder, val_records, val, "validation") if val_records else []),
            shown=examples[0],
            tallies={"train": train, "validation": val},
            notes=notes + self.remarks(encoder, train_records, val_records),
            prompts=self.prompts(encoder, val_records or train_records),
        )

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoder, list[str]]:
        """What makes examples of records, and a note where its template is not the tokenizer's own."""
        notes = self.prepare_tokenizer(tokenizer)
        renderer = ChatRenderer(tokenizer, train_on=self.train_on, system_prompt=self.system_prompt)
        return Encoder(renderer, max_length=self.max_length), notes

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Gives it the chat template of this run, with a note where that is not its own."""
        if self._template_notes is None:
            note = install_template(tokenizer, self.chat_template)
            self._template_notes = [note] if note else []
        return self._template_notes

    def encode(self, encoder: Encoder, records: Sequence[Record], tally: Tally, what: str) -> list[Example]:
        """Examples of records.

        Raises:
            LoraConfigError: If too many rows are bad, or no example has a label.
        """
        examples = encoder.encode(records, tally, on_bad_row=self.on_bad_row)
        tally.check()
        tally.require_labels(what, self.max_length)
        return examples

    def remarks(self, encoder: Encoder, train: Sequence[Record], validation: Sequence[Record]) -> list[str]:
        """What people should know about how the rows are trained."""
        chats = [record for record in train if record.text is None]
        notes = []
        if len(chats) < len(train):
            notes.append("Of plain text every token is trained, and the end of the text.")
        if self.train_on == "completion" and any(record.completion is None for record in chats):
            notes.append("Conversations have no completion of their own: every turn of the assistant is trained.")
        if chats and not encoder.renderer.ends_turns(encoder.renderer.examples(chats[0])[0]):
            notes.append(
                "WARNING: the chat template ends the assistant's turns with no token of their own, so the model "
                "cannot learn where to stop."
            )
        if not validation:
            notes.append("There are no rows for validation.")
        return notes

    def prompts(self, encoder: Encoder, records: Sequence[Record]) -> list[SamplePrompt]:
        """Fixed prompts from the first records."""
        return [_sample_prompt(record, encoder.renderer) for record in records[: self.samples]]


def _sample_prompt(record: Record, renderer: ChatRenderer) -> SamplePrompt:
    if record.text is not None:
        ends = [word.end() for word in re.finditer(r"\S+", record.text)]
        half = ends[min(len(ends) // 2, 16) - 1] if len(ends) > 1 else len(record.text)
        tokenizer = renderer.tokenizer
        # What the tokenizer puts before a text belongs to the prompt, what it puts behind it does not.
        before = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        begin = str(tokenizer.decode(before)) if before else ""
        return SamplePrompt(begin + record.text[:half], _short(record.text[:half]), record.text[half:].strip())
    last = answers(record.messages)[-1]
    asked = next((m["content"] for m in reversed(record.messages[:last]) if m["role"] == "user"), "")
    return SamplePrompt(renderer.prompt(record), _short(asked), record.messages[last]["content"])


def _short(text: str) -> str:
    return textwrap.shorten(text, 160, placeholder=" …")
