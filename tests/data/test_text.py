import pytest

from lora_lightning.data import TextData
from lora_lightning.data.chat import TRAIN_ON
from lora_lightning.errors import LoraConfigError
from tests.data.conftest import NO_END
from tests.data.test_stream import answers


def told(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_file_is_split_read_and_told(tokenizer, numbered, capsys):
    data = TextData(str(numbered(40)), tokenizer=tokenizer, batch_size=8)
    data.setup("fit")
    train, held = (answers(tokenizer, loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert sorted(train + held) == sorted(f"answer {n}" for n in range(40))
    assert len(held) == 2
    out = told(capsys)
    assert "40 rows read as prompt_completion (columns prompt, completion)." in out
    assert "⟦answer" in out
    assert "<|im_end|>" in out
    data.setup("fit")
    assert told(capsys) == ""  # once


def test_equal_rows_are_on_one_side(tokenizer, write):
    rows = [{"prompt": "q", "completion": f"answer {n % 30}"} for n in range(60)]
    data = TextData(str(write(rows)), tokenizer=tokenizer, val_split=0.3)
    data.setup()
    train, held = (set(answers(tokenizer, loader)) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert len(held) == 9
    assert not train & held


def test_rows_for_validation_may_come_apart(tokenizer, numbered, tmp_path):
    numbered(10, "d/train.jsonl"), numbered(3, "d/validation.jsonl"), numbered(4, "other.jsonl")
    for options, count in [({}, 3), ({"val_path": str(tmp_path / "other.jsonl")}, 4)]:
        data = TextData(str(tmp_path / "d"), tokenizer=tokenizer, **options)
        data.setup()
        assert answers(tokenizer, data.val_dataloader()) == [f"answer {n}" for n in range(count)]
        assert len(answers(tokenizer, data.train_dataloader())) == 10


def test_without_validation(tokenizer, numbered, capsys):
    data = TextData(str(numbered(5)), tokenizer=tokenizer, val_split=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.sample_prompts()) == 3
    assert "no rows for validation" in told(capsys)


def bad_file(write, good, bad):
    return str(write([{"prompt": "q", "completion": "a"}] * good + [{"prompt": "q", "completion": ""}] * bad))


def test_bad_rows_are_dropped_counted_and_shown(tokenizer, write, capsys):
    data = TextData(bad_file(write, 120, 6), tokenizer=tokenizer, val_split=0)
    data.setup("fit")
    out = told(capsys).replace(" ", "")
    assert "rows.jsonl:121:'completion'isempty" in out
    assert "rows.jsonl:126" not in out
    assert "…and1more" in out
    assert data.loaded.tallies["train"].bad == 6
    assert len(data.loaded.train) == 120


@pytest.mark.parametrize(
    ("good", "bad", "options", "message"),
    [
        (94, 6, {}, r"6 of 100 rows cannot be used, more than 5%:\n  .*rows.jsonl:95: 'completion' is empty"),
        (99, 1, {"on_bad_row": "error"}, r"A bad row.*\n  .*rows.jsonl:100: 'completion' is empty"),
        (0, 9, {}, "9 of 9 rows cannot be used"),
        (0, 0, {}, "rows.jsonl is empty"),
        (9, 0, {"max_length": 2}, "9 examples were cut before their answer, at max_length=2"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_trained_on_is_refused(tokenizer, write, good, bad, options, message, streaming):
    data = TextData(bad_file(write, good, bad), tokenizer=tokenizer, val_split=0, streaming=streaming, **options)
    with pytest.raises(LoraConfigError, match=message):
        data.setup("fit")


def test_no_row_with_the_needed_field_names_those_found(tokenizer, write):
    data = TextData(str(write([{"title": "t", "answer": "a"}] * 3)), tokenizer=tokenizer)
    with pytest.raises(
        LoraConfigError, match=r"found: 'title', 'answer' \(perhaps rename 'answer' to 'completion'\?\)"
    ):
        data.setup("fit")


def test_what_is_special_is_said(tokenizer, write, capsys):
    tokenizer.chat_template = NO_END
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    TextData(str(write([{"messages": turns}] * 3)), tokenizer=tokenizer, val_split=0).setup("fit")
    out = told(capsys)
    assert "every turn of the assistant is trained" in out
    assert "cannot learn where to stop" in out


def test_prompts_of_plain_text(tokenizer, write):
    data = TextData(str(write([{"text": "one two  three four"}])), tokenizer=tokenizer, val_split=0)
    data.setup()
    [sample] = data.sample_prompts()
    assert (sample.prompt, sample.shown, sample.reference) == ("one two", "one two", "three four")


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(LoraConfigError, match=r"did you mean sharegpt\?.*on_bad_row='skip'.*val_split"):
        TextData("x", format="sharegtp", on_bad_row="skip", val_split=2)
    with pytest.raises(LoraConfigError, match="batch_size must be at least 1, got 0; max_length"):
        TextData("x", batch_size=0, max_length=1)
    with pytest.raises(LoraConfigError, match=rf"train_on='completions' is none of {', '.join(TRAIN_ON)} \(did you"):
        TextData("x", train_on="completions")
