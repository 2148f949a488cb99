"""From text to tokens and labels, with a count of everything that was cut or dropped on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.chat import ChatRenderer, Rendered
from lora_lightning.data.formats import Record, RowProblem
from lora_lightning.errors import LoraConfigError

IGNORED = -100
"""The label of a token that is not trained."""
BAD_ROWS_ALLOWED = 0.05
"""The share of bad rows above which something is wrong with the file rather than with the rows."""
BAD_ROWS_SHOWN = 5

Example = dict[str, Tensor]
"""``input_ids`` and ``labels``, each (T,) int32; or for classification ``labels`` as ()."""


@dataclass
class Tally:
    """What became of the rows."""

    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    """The first bad rows, each with its file and line."""
    cut: int = 0
    """Examples that lost their end to ``max_length`` and still have something to train."""
    unanswered: int = 0
    """Examples dropped because ``max_length`` left nothing to train."""
    nearest_answer: int | None = None
    """The least ``max_length`` that would have left something to train of one of them."""
    rewritten: int = 0
    """Examples beyond one a row, where the chat template rewrites earlier turns."""
    examples: int = 0
    tokens: int = 0
    trained: int = 0

    def drop(self, where: str, problem: object, *, on_bad_row: str = "drop") -> None:
        """Counts a bad row.

        Raises:
            LoraConfigError: If ``on_bad_row`` is ``"error"``.
        """
        self.bad += 1
        if len(self.problems) < BAD_ROWS_SHOWN:
            self.problems.append(f"{where}: {problem}")
        if on_bad_row == "error":
            raise LoraConfigError(f"A bad row (on_bad_row=drop would pass over it):\n  {where}: {problem}")

    def check(self) -> None:
        """Raises where too many rows are bad.

        Raises:
            LoraConfigError: If they are more than :data:`BAD_ROWS_ALLOWED` of all.
        """
        if self.bad > BAD_ROWS_ALLOWED * self.rows:
            raise LoraConfigError(
                f"{self.bad} of {self.rows} rows cannot be used, more than {BAD_ROWS_ALLOWED:.0%}:\n  {self.shown()}"
            )

    def require_labels(self, what: str, max_length: int) -> None:
        """Raises where nothing is left to train on, which would look like a healthy run with a loss of 0.

        Raises:
            LoraConfigError: If there is no example; says why, and what to change.
        """
        if self.examples:
            return
        why = [f"{self.bad} rows cannot be used:\n  {self.shown()}"] if self.bad else []
        if self.unanswered:
            least = f"; the first answer would begin to fit at max_length={self.nearest_answer}"
            why.append(
                f"{self.unanswered} examples were cut before their answer, at max_length={max_length}"
                f"{least if self.nearest_answer else ''}. Raise max_length, or shorten the prompts."
            )
        raise LoraConfigError(f"No {what} example has a label left to train. " + "\n".join(why or ["There is no row."]))

    def shown(self) -> str:
        """The first bad rows, one a line."""
        more = [f"… and {self.bad - len(self.problems)} more"] if self.bad > len(self.problems) else []
        return "\n  ".join([*self.problems, *more])


class Encoder:
    """Tokenises records and marks their trained tokens.

    A text is tokenised once and whole; a token is trained if its last character is. Where a token would reach across
    the beginning of an answer, prompt and answer are tokenised apart instead, as they are when the model is used.

    Args:
        renderer: Makes text of conversations.
        max_length: Longer examples are cut at the right.

    Raises:
        LoraConfigError: If the tokenizer cannot tell which characters a token stands for.
    """

    def __init__(self, renderer: ChatRenderer, *, max_length: int) -> None:
        self.renderer = renderer
        self.tokenizer: PreTrainedTokenizerBase = renderer.tokenizer
        self.max_length = max_length
        if not self.tokenizer.is_fast:
            raise LoraConfigError(
                f"A fast tokenizer is needed (one that knows the characters of a token), got "
                f"{type(self.tokenizer).__name__}: load it with use_fast=True."
            )

    def encode(self, records: Iterable[Record], tally: Tally, *, on_bad_row: str = "drop") -> list[Example]:
        """Examples of records, in order.

        Args:
            records: In canonical form.
            tally: Counts what happens to them.
            on_bad_row: ``"error"`` raises where a row has to be dropped.
        """
        chats: list[Rendered | str] = []
        for record in records:
            if record.text is not None:
                chats.append(record.text)
                continue
            try:
                rendered = self.renderer.examples(record)
            except RowProblem as problem:
                tally.drop(record.where, problem, on_bad_row=on_bad_row)
                continue
            tally.rewritten += len(rendered) - 1
            chats += rendered
        if not chats:
            return []
        plain = iter(self._encode_text([chat for chat in chats if isinstance(chat, str)]))
        chat = iter(self._encode_chat([chat for chat in chats if isinstance(chat, Rendered)]))
        examples = (next(plain) if isinstance(one, str) else next(chat) for one in chats)
        return [example for ids, labels in examples if (example := self._finish(ids, labels, tally))]

    def _encode_text(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        rows = [
            ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in self.tokenizer(list(texts))["input_ids"]
        ]
        return [(ids, ids) for ids in rows]

    def _encode_chat(self, chats: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
        if not chats:
            return []
        encoded = self.tokenizer([chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=True)
        return [
            self._label(chat, ids, offsets)
            for chat, ids, offsets in zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _label(self, chat: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        labels = [IGNORED] * len(ids)
        token = 0
        for start, end in chat.spans:
            # Ends are compared, not beginnings: trimming tokenizers leave blanks out at a token's beginning.
            while token < len(ids) and offsets[token][1] <= start:
                token += 1
            if token < len(ids) and offsets[token][0] < start:
                return self._label_in_pieces(chat)
            while token < len(ids) and offsets[token][1] <= end:
                labels[token] = ids[token]
                token += 1
        return ids, labels

    def _label_in_pieces(self, chat: Rendered) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        edges = [0, *(edge for span in chat.spans for edge in span), len(chat.text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            piece = self.tokenizer(chat.text[start:end], add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if number % 2 else [IGNORED] * len(piece)
        return ids, labels

    def _finish(self, ids: list[int], labels: list[int], tally: Tally) -> Example | None:
        was_cut = len(ids) > self.max_length
        needed = next((place + 2 for place, label in enumerate(labels[1:]) if label != IGNORED), None)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        trained = sum(label != IGNORED for label in labels[1:])  # nothing stands before the first token to predict it
        if not trained:
            tally.unanswered += 1
            tally.nearest_answer = min(filter(None, (tally.nearest_answer, needed)), default=None)
            return None
        tally.cut += was_cut
        tally.examples += 1
        tally.tokens += len(ids)
        tally.trained += trained
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int32),
            "labels": torch.tensor(labels, dtype=torch.int32),
        }
