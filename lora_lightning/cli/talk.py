"""The work of `generate`: questions and commands come in, the answers of each voice go out while they are written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from lora_lightning.cli.quiet import quieten
from lora_lightning.cli.told import show_error
from lora_lightning.cli.voices import BASE, Voice, Voices, load_voices
from lora_lightning.cli.which_adapter import Which
from lora_lightning.cli.written import Columns, Plain
from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.tasks.stream import Sampling, stream_text

_HELP = """/adapter, /base, /both  who answers
/reset                  forget what was said
/temperature 0.7        draw tokens; 0: the likeliest always
/top_p 0.9              draw among the likeliest of this probability
/tokens 256             of an answer, at most
/seed 1                 of what is drawn
/system TEXT            a system message for all; alone: none; default: that of each one's training. Begins anew
/quit                   or Ctrl-D; Ctrl-C ends an answer"""


def talk(
    places: Sequence[Which],
    *,
    prompt: Sequence[str] | None,
    base: str | None,
    any_base: bool,
    system: str | None,
    raw: bool,
    only: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Answer prompts, the lines of a pipe, or a person at the terminal.

    Args:
        places: The adapters.
        prompt: What to answer, each a conversation of its own; None reads from the input.
        base: Name or folder of the base model; None takes the run's or the adapter's word.
        any_base: Take a base that is not the one of the training.
        system: A system message; None takes that of each run's data.
        raw: Continue texts as they stand.
        only: ``adapter`` or ``base``: one side alone answers.
        max_new_tokens: Of an answer, at most.
        temperature: 0 takes the likeliest token.
        top_p: Of what is drawn.
        seed: Of what is drawn.
        trust_remote_code: Run code from the base model's repository.

    Raises:
        LoraConfigError: A setting is wrong, or the base cannot be had.
        AdapterError: An adapter cannot be used.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    quieten(bars=False)
    voices = load_voices(places, base=base, any_base=any_base, trust_remote_code=trust_remote_code)
    conversation = Conversation(voices, sampling, system, raw=raw)
    if only is not None:
        conversation.obey(f"/{only}")
    screen = Columns() if sys.stdout.isatty() else Plain()
    if prompt is None and sys.stdin.isatty():
        _with_a_person(conversation, screen)
        return
    for text in _lines(sys.stdin) if prompt is None else prompt:
        if prompt is None and text.startswith("/"):
            if not conversation.obey(text):
                return
        else:
            conversation.reset()
            screen.question(text)
            conversation.answer(text, screen)


class Conversation:
    """What was said with each voice, and how the next answer is to be made.

    Args:
        voices: Those who answer.
        sampling: How tokens are chosen.
        system: A system message; empty: none; None: that of each one's training.
        raw: Continue texts as they stand, without a chat template and without a history.
    """

    def __init__(self, voices: Voices, sampling: Sampling, system: str | None = None, *, raw: bool = False) -> None:
        self.sampling = sampling
        self.system = system
        self._voices = voices
        self._raw = raw
        self._speaking = list(voices.voices)
        self._said: dict[str, list[dict[str, str]]] = {}
        self.reset()

    @property
    def speaking(self) -> list[str]:
        """The names of those who answer."""
        return [voice.name for voice in self._speaking]

    def reset(self) -> None:
        """Forget what was said."""
        self._said = {voice.name: self._beginning(voice) for voice in self._voices.voices}

    def _beginning(self, voice: Voice) -> list[dict[str, str]]:
        system = voice.reading.system if self.system is None else self.system
        return [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, screen: Columns | Plain) -> None:
        """Have all voices answer, one after the other; an interrupt ends the answers, and what there is of them stays.

        Raises:
            LoraConfigError: What was said is longer than the model can read, or its chat template refuses it.
        """
        with screen.answers(self.speaking) as tell:
            for voice in self._speaking:
                self._answer(voice, text, tell(voice.name))

    def _answer(self, voice: Voice, text: str, tell: Callable[[str], None]) -> None:
        said, pieces = self._said[voice.name], list[str]()
        asked = [*said, {"role": "user", "content": text}]
        tokenizer = voice.reading.tokenizer

        def heard(piece: str) -> None:
            pieces.append(piece)
            tell(piece)

        try:
            with voice.answering():
                stream_text(self._voices.model, tokenizer, self._prompt(tokenizer, asked), self.sampling, heard)
        finally:
            if pieces and not self._raw:
                said[:] = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _prompt(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        if not self._raw:
            try:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                system = messages[0]["role"] == "system"
                remedy = ". To leave the system message out: --system '', or /system" if system else ""
                raise LoraConfigError(f"the chat template refuses this conversation: {error}{remedy}") from error
        # What the tokenizer puts before a text belongs to it, what it puts behind does not.
        before = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        return (tokenizer.decode(before) if before else "") + messages[-1]["content"]

    def obey(self, line: str) -> bool:
        """Do what a command says.

        Returns:
            Whether to go on: false for /quit.

        Raises:
            LoraConfigError: There is no such command, or its value makes no sense.
        """
        name, _, value = line[1:].strip().partition(" ")
        numbers: dict[str, tuple[str, Callable[[str], Any]]] = {
            "temperature": ("temperature", float),
            "top_p": ("top_p", float),
            "tokens": ("max_new_tokens", int),
            "seed": ("seed", int),
        }
        sides = {
            "base": self._voices.voices[:1],
            "adapter": self._voices.voices[1:],
            "both": self._voices.voices,
        }
        if name in ("quit", "exit"):
            return False
        if name in sides:
            self._speaking = list(sides[name])
        elif name in numbers:
            field, kind = numbers[name]
            self.sampling = replace(self.sampling, **{field: _number(name, value, kind)})
        elif name == "system":
            self.system = None if value.strip() == "default" else value.strip()
            self.reset()
        elif name == "reset":
            self.reset()
        elif name == "help":
            print(_HELP)
        else:
            known = [*sides, *numbers, "system", "reset", "help", "quit"]
            raise LoraConfigError(f"There is no command /{name}{did_you_mean(name, known)}; /help lists them")
        return True


def _number(name: str, value: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise LoraConfigError(f"/{name} wants a number behind it, got {value!r}") from None


def _lines(source: Iterable[str]) -> Iterable[str]:
    return filter(None, (line.strip() for line in source))


def _with_a_person(conversation: Conversation, screen: Columns | Plain) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the line can be edited, and earlier ones called back
    print(f"{BASE} and {', '.join(name for name in conversation.speaking if name != BASE)}; /help lists the commands")
    while True:
        try:
            line = input("› ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the program")
            continue
        try:
            if line.startswith("/"):
                if not conversation.obey(line):
                    return
            elif line:
                conversation.answer(line, screen)
        except KeyboardInterrupt:
            pass  # of an answer, which stands there as far as it came
        except LoraConfigError as error:
            show_error(error)
