import pytest

from lora_lightning.data.chat import ChatRenderer
from lora_lightning.data.encode import Encoder, Tally
from lora_lightning.data.formats import Record
from lora_lightning.errors import LoraConfigError
from tests.data.conftest import LLAMA2

ASKED = {"role": "user", "content": "one two three"}
RECORD = Record("f:1", (ASKED, {"role": "assistant", "content": "four five six"}), 1)


def encode(tokenizer, records, max_length):
    tally = Tally(rows=len(records))
    return Encoder(ChatRenderer(tokenizer), max_length=max_length).encode(records, tally), tally


def test_text_is_trained_whole_and_ends(tokenizer):
    [example], tally = encode(tokenizer, [Record("f:1", text="one two")], 99)
    ids = [*tokenizer("one two", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert example["input_ids"].tolist() == example["labels"].tolist() == ids
    assert (tally.tokens, tally.trained) == (len(ids), len(ids) - 1)  # nothing predicts the first


def test_order_is_kept_where_texts_and_chats_mix(tokenizer):
    text = Record("f:2", text="one two")
    examples, _ = encode(tokenizer, [text, RECORD, text], 99)
    assert [(e["labels"] == -100).any().item() for e in examples] == [False, True, False]


def test_a_long_row_is_cut_at_the_right(tokenizer):
    [whole], _ = encode(tokenizer, [RECORD], 99)
    length = len(whole["input_ids"]) - 3
    [example], tally = encode(tokenizer, [RECORD], length)
    assert example["input_ids"].tolist() == whole["input_ids"][:length].tolist()
    assert example["labels"].tolist() == whole["labels"][:length].tolist()
    assert (tally.cut, tally.unanswered) == (1, 0)


def test_a_row_without_labels_is_dropped_and_what_would_help_is_told(tokenizer):
    [whole], _ = encode(tokenizer, [RECORD], 99)
    first = (whole["labels"] != -100).nonzero()[0].item()
    examples, tally = encode(tokenizer, [RECORD], first)
    assert examples == []
    assert (tally.unanswered, tally.nearest_answer) == (1, first + 1)
    with pytest.raises(LoraConfigError, match=f"cut before their answer.*max_length={first + 1}. Raise max_length"):
        tally.require_labels("training", first)
    assert len(encode(tokenizer, [RECORD], first + 1)[0]) == 1


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer):
    tokenizer.chat_template = LLAMA2
    refused = Record("f:7", ({"role": "system", "content": "s"}, *RECORD.messages))
    examples, tally = encode(tokenizer, [RECORD] * 25 + [refused], 99)
    assert (len(examples), tally.bad) == (25, 1)
    assert tally.problems[0].startswith("f:7: the chat template refuses it")
    tally.check()
    with pytest.raises(LoraConfigError, match=r"1 of 2 rows cannot be used, more than 5%:\n  f:7"):
        encode(tokenizer, [RECORD, refused], 99)[1].check()


def test_an_answer_that_grows_into_the_prompt_is_tokenised_apart(tokenizer):
    # One token reaches over the blank that ends the prompt and the two that begin the answer.
    text = "{{ 'q ' }}{% if not add_generation_prompt %}{{ '  a' + eos_token }}{% endif %}"
    tokenizer.chat_template = text
    tokenizer.add_tokens(["   "])
    [example], _ = encode(tokenizer, [RECORD], 99)
    assert tokenizer.decode(example["labels"][example["labels"] != -100].tolist()) == "  a<|im_end|>"
    assert tokenizer.decode(example["input_ids"].tolist()) == "q   a<|im_end|>"


def test_a_slow_tokenizer_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(LoraConfigError, match="fast tokenizer"):
        Encoder(ChatRenderer(tokenizer), max_length=9)
