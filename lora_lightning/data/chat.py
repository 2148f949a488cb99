"""A conversation as the model reads it: rendered through the chat template, with the characters that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.formats import Message, Record, RowProblem, answers
from lora_lightning.errors import LoraConfigError

TRAIN_ON = ("completion", "assistant", "last", "all")
"""What may be trained: the completion of a row, every turn of the assistant, its last turn, every token."""

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For tokenizers without a template, as those of base models: headings, and answers that end in ``eos_token``."""


@dataclass(frozen=True)
class Rendered:
    """The text of one example, and the ranges of its characters that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


def install_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str:
    """Gives the tokenizer the chat template that this run uses, so that generation and saved files agree with it.

    Args:
        tokenizer: Changed in place.
        chat_template: A template, or the path of a ``.jinja`` file; None keeps the tokenizer's own.

    Returns:
        A sentence for people about where the template is from; empty where it is the tokenizer's own.

    Raises:
        LoraConfigError: If there is no such file, or neither a template nor an end-of-text token to build one on.
    """
    if chat_template is not None:
        if "{" in chat_template:
            tokenizer.chat_template = chat_template
            return "The chat template is the one given as `chat_template`."
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise LoraConfigError(
                f"chat_template={chat_template!r} is neither a template (it has no '{{') nor a file that exists."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return f"The chat template is read from {path}."
    if tokenizer.chat_template:
        return ""
    if tokenizer.eos_token is None:
        raise LoraConfigError(
            "The tokenizer has no chat template, and no eos_token to end the turns of a default one with: "
            "give `chat_template`."
        )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return (
        f"The tokenizer has no chat template: '### User:' headings are used, and answers end in {tokenizer.eos_token}."
    )


class ChatRenderer:
    """Renders conversations and finds in the text what is trained.

    For a turn of the assistant, the prompt P is what the template makes of the turns before it with the generation
    prompt, and F is what it makes of them and the turn: what F has beyond P is trained, up to and with the token that
    ends the turn. Turns whose F is the beginning of the next one's share an example. Some templates rewrite earlier
    turns (they drop their thinking, say); there, an example ends and a new one begins, so that each trained turn stands
    behind exactly the text that it will stand behind when the model is used.

    Args:
        tokenizer: With a chat template.
        train_on: One of :data:`TRAIN_ON`.
        system_prompt: Takes the place of a row's own system message, or of none; None leaves rows as they are.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_on: str = "completion", system_prompt: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.system_prompt = system_prompt
        self._ends = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})

    def examples(self, record: Record) -> list[Rendered]:
        """The examples of one conversation: one, or several where the template rewrites earlier turns.

        Raises:
            RowProblem: If the template refuses the conversation, or what stands before an answer depends on it.
        """
        messages, shift = self._with_system(record.messages)
        if self.train_on == "all":
            text = self._render(messages)
            return [Rendered(text, ((0, len(text)),))]
        done: list[Rendered] = []
        for turn in self._trained_turns(record):
            text, span = self._turn(messages, turn + shift)
            if done and text.startswith(done[-1].text[: done[-1].spans[-1][1]]):
                done[-1] = Rendered(text, (*done[-1].spans, span))
            else:
                done.append(Rendered(text, (span,)))
        return done

    def prompt(self, record: Record) -> str:
        """What the model is given to write the record's last answer: all before it, and the generation prompt."""
        messages, shift = self._with_system(record.messages)
        return self._render(messages[: answers(record.messages)[-1] + shift], generate=True)

    def ends_turns(self, rendered: Rendered) -> bool:
        """Whether a trained turn ends in a token of its own, without which a model never learns to stop."""
        return rendered.text[: rendered.spans[-1][1]].rstrip().endswith(self._ends)

    def _with_system(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """The messages under the system prompt, and by how many places they moved back."""
        if self.system_prompt is None:
            return list(messages), 0
        own = messages[0]["role"] == "system"
        return [{"role": "system", "content": self.system_prompt}, *messages[own:]], 1 - own

    def _trained_turns(self, record: Record) -> list[int]:
        turns = answers(record.messages)
        if self.train_on == "last":
            return turns[-1:]
        if self.train_on == "completion" and record.completion is not None:
            return [turn for turn in turns if turn >= record.completion]
        return turns

    def _turn(self, messages: list[Message], turn: int) -> tuple[str, tuple[int, int]]:
        before, text = self._render(messages[:turn], generate=True), self._render(messages[: turn + 1])
        start = len(before)
        if not text.startswith(before):
            # Some templates open the answer differently from how they remember it (a generation prompt that begins
            # the thinking, say): trained is then all from where the two part, if that is behind the last question.
            start = _common(before, text)
            if start < _common(before, self._render(messages[:turn])):
                raise RowProblem("the chat template rewrites the prompt once the answer stands behind it")
        if len(text) <= start:
            raise RowProblem("the chat template leaves nothing of the answer")
        return text, (
            start,
            len(text),
        )  # all that the template writes of the turn, as TRL's completion-only loss has it

    def _render(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RowProblem(f"the chat template refuses it: {error}") from error


def _common(one: str, other: str) -> int:
    """The number of characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
