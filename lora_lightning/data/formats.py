"""The shapes that rows come in, told apart by their columns, and the one canonical form they are brought into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_lightning.data.sources import Row

Message = dict[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "…"}``."""

ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_ALIASES = {
    "question": "prompt", "query": "prompt", "input": "prompt",
    "answer": "completion", "response": "completion", "output": "completion", "chosen": "completion",
    "conversation": "messages", "chat": "messages", "dialogue": "messages",
    "content": "text", "body": "text", "document": "text",
}  # fmt: skip


class RowProblem(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """One row in canonical form: a conversation, or plain text."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...] = ()
    completion: int | None = None
    """The first message of the completion, where the row says which part is prompt and which completion."""
    text: str | None = None
    """The text of a row that is no conversation."""

    @property
    def fingerprint(self) -> str:
        """The same for rows of the same content, wherever they stand and whenever they are read."""
        said = self.text if self.text is not None else repr([(m["role"], m["content"]) for m in self.messages])
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def answers(messages: Sequence[Message]) -> list[int]:
    """The places of the assistant's turns; one that opens a conversation answers nothing and does not count."""
    return [place for place, message in enumerate(messages) if place and message["role"] == "assistant"]


def _text(fields: Mapping[str, object], name: str, *, empty: bool = False) -> str:
    value = fields.get(name)
    if empty and value is None:
        return ""
    if not isinstance(value, str):
        raise RowProblem(f"{name!r} must be text, got {'null' if value is None else type(value).__name__}")
    if not (empty or value.strip()):
        raise RowProblem(f"{name!r} is empty")
    return value


def _turns(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{name!r} must be a list of messages, got {value if value == [] else type(value).__name__}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise RowProblem(f"message {number} of {name!r} must be an object, got {type(turn).__name__}")
        speaker = turn.get("role", turn.get("from"))
        role = _SPEAKERS.get(str(speaker), speaker)
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise RowProblem(f"message {number} of {name!r} has the role {speaker!r}, not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RowProblem(f"message {number} of {name!r} has no text, got {type(content).__name__}")
        if role == "assistant" and not content.strip():
            raise RowProblem(f"message {number} of {name!r} is an empty answer")
        turns.append({"role": str(role), "content": content})
    return turns


def _conversation(where: str, turns: list[Message], completion: int | None = None) -> Record:
    if not any(turn >= (completion or 0) for turn in answers(turns)):
        raise RowProblem("no answer of the assistant in it")
    return Record(where, tuple(turns), completion)


def _said(fields: Mapping[str, object], name: str, role: str) -> list[Message]:
    value = fields[name]
    return _turns(value, name) if isinstance(value, list) else [{"role": role, "content": _text(fields, name)}]


def _prompt_completion(where: str, fields: Mapping[str, object]) -> Record:
    before = _said(fields, "prompt", "user")
    return _conversation(where, before + _said(fields, "completion", "assistant"), len(before))


def _alpaca(where: str, fields: Mapping[str, object]) -> Record:
    asked = "\n\n".join(filter(None, (_text(fields, "instruction"), _text(fields, "input", empty=True))))
    answer = {"role": "assistant", "content": _text(fields, "output")}
    return Record(where, ({"role": "user", "content": asked}, answer), 1)


def _sharegpt(where: str, fields: Mapping[str, object]) -> Record:
    return _conversation(where, _turns(fields["conversations"], "conversations"))


def _messages(where: str, fields: Mapping[str, object]) -> Record:
    return _conversation(where, _turns(fields["messages"], "messages"))


def _plain(where: str, fields: Mapping[str, object]) -> Record:
    return Record(where, text=_text(fields, "text"))


@dataclass(frozen=True)
class Format:
    """A shape of rows: the columns it needs, those it also understands, and what reads it."""

    needs: tuple[str, ...]
    read: Callable[[str, Mapping[str, object]], Record]
    takes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input",)),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "text": Format(("text",), _plain),
}
"""By name; where a row fits several, the first one here is meant."""


def to_record(row: Row, format: str = "auto") -> tuple[Record, str]:
    """Brings a row into canonical form.

    Args:
        row: As read.
        format: One of :data:`FORMATS`, or ``"auto"``: told from the row's columns.

    Returns:
        The record, and what it was read as: ``"alpaca (columns instruction, input, output)"``.

    Raises:
        RowProblem: If a field is missing, empty or of the wrong kind.
    """
    if row.problem:
        raise RowProblem(row.problem)
    fits = (name for name, shape in FORMATS.items() if all(column in row.fields for column in shape.needs))
    name = next(fits, None) if format == "auto" else format
    if name is None or not all(column in row.fields for column in FORMATS[name].needs):
        raise RowProblem(_what_is_missing(row.fields, name))
    shape = FORMATS[name]
    columns = [column for column in row.fields if column in (*shape.needs, *shape.takes)]
    read_as = f"{name} ({'columns' if len(columns) > 1 else 'column'} {', '.join(columns)})"
    return shape.read(row.where, row.fields), read_as


def _what_is_missing(fields: Mapping[str, object], name: str | None) -> str:
    found = ", ".join(repr(column) for column in fields) or "none"
    wanted = [FORMATS[name].needs] if name else [shape.needs for shape in FORMATS.values()]
    renames = [
        f"{column!r} to {_ALIASES[column.lower()]!r}"
        for column in fields
        if any(_ALIASES.get(column.lower()) in needs for needs in wanted) and _ALIASES[column.lower()] not in fields
    ]
    hint = f" (perhaps rename {' and '.join(renames)}?)" if renames else ""
    return f"needed are the fields {' or '.join('+'.join(needs) for needs in wanted)}; found: {found}{hint}"
