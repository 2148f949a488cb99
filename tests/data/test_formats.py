import pytest

from lora_lightning.data.formats import FORMATS, Record, RowProblem, to_record
from lora_lightning.data.sources import Row

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


def turns(*pairs):
    return tuple({"role": role, "content": content} for role, content in pairs)


@pytest.mark.parametrize(
    ("fields", "record", "read_as"),
    [
        (
            {"id": 1, "prompt": "q", "completion": "a"},
            Record("f:1", turns(("user", "q"), ("assistant", "a")), 1),
            "prompt_completion (columns prompt, completion)",
        ),
        (
            {"prompt": [S, U], "completion": [A]},
            Record("f:1", (S, U, A), 2),
            "prompt_completion (columns prompt, completion)",
        ),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            Record("f:1", turns(("user", "i\n\nx"), ("assistant", "o")), 1),
            "alpaca (columns instruction, input, output)",
        ),
        (
            {"instruction": "i", "input": "", "output": "o"},
            Record("f:1", turns(("user", "i"), ("assistant", "o")), 1),
            "alpaca (columns instruction, input, output)",
        ),
        (
            {"instruction": "i", "input": None, "output": "o"},
            Record("f:1", turns(("user", "i"), ("assistant", "o")), 1),
            "alpaca (columns instruction, input, output)",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Record("f:1", turns(("user", "q"), ("assistant", "a"))),
            "sharegpt (column conversations)",
        ),
        ({"prompt": "q", "messages": [S, U, A, U, A]}, Record("f:1", (S, U, A, U, A)), "messages (column messages)"),
        ({"text": "t", "label": 3}, Record("f:1", text="t"), "text (column text)"),
    ],
)
def test_formats_are_told_apart_by_columns(fields, record, read_as):
    assert to_record(Row("f:1", fields)) == (record, read_as)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": "q", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "q", "completion": None}, "'completion' must be text, got null"),
        ({"prompt": "q", "completion": 3}, "'completion' must be text, got int"),
        ({"question": "q", "answer": "a"}, "found: 'question', 'answer' .*'question' to 'prompt' and 'answer' to 'com"),
        ({"prompt": "q"}, r"prompt\+completion.*found: 'prompt'$"),
        ({}, "found: none"),
        ({"messages": "hello"}, "must be a list of messages, got str"),
        ({"messages": []}, r"must be a list of messages, got \[\]"),
        ({"messages": [U, "x"]}, "message 2 of 'messages' must be an object, got str"),
        ({"messages": [U, {"role": "bot", "content": "x"}]}, "message 2 of 'messages' has the role 'bot'"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "message 2 of 'messages' has no text"),
        ({"messages": [U, {"role": "assistant", "content": " "}]}, "message 2 of 'messages' is an empty answer"),
        ({"messages": [S, U]}, "no answer"),
        ({"messages": [A, U]}, "no answer"),
        ({"prompt": [U, A, U], "completion": [U]}, "no answer"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(fields, problem):
    with pytest.raises(RowProblem, match=problem):
        to_record(Row("f:1", fields))


def test_a_given_format_is_used_though_another_fits():
    fields = {"messages": [U, A], "text": "t"}
    assert to_record(Row("f:1", fields), "text")[0].text == "t"
    with pytest.raises(RowProblem, match=r"needed are the fields instruction\+output; found"):
        to_record(Row("f:1", fields), "alpaca")


def test_the_fingerprint_is_of_the_content_alone():
    one, same = Record("f:1", (U, A)), Record("f:2", (U, A), 1)
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != Record("f:1", (U, U)).fingerprint
    assert set(FORMATS) == {"messages", "sharegpt", "alpaca", "prompt_completion", "text"}
