"""What is trained of a conversation, checked against the conversation itself."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.chat import DEFAULT_CHAT_TEMPLATE, ChatRenderer, install_template
from lora_lightning.data.encode import Encoder, Tally
from lora_lightning.data.formats import Record, RowProblem
from lora_lightning.errors import LoraConfigError
from tests.data.conftest import CHATML, FORGETTING, LLAMA2, NO_END, TEMPLATES, THINKING, train_tokenizer

END = "<|im_end|>\n"  # what the template writes behind an answer


@functools.cache
def shared_tokenizer():
    return train_tokenizer()


def encoded(record, template, *, tokenizer=None, train_on="assistant", system_prompt=None, max_length=10_000):
    """The examples of a record as (whole text, list of runs of trained text), decoded from tokens."""
    tokenizer = tokenizer or shared_tokenizer()
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer, train_on=train_on, system_prompt=system_prompt)
    examples = Encoder(renderer, max_length=max_length).encode([record], tally := Tally(rows=1), on_bad_row="error")
    assert tally.examples == len(examples)
    found = []
    for example in examples:
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        runs, before = [], -100
        for label in labels:
            if label != -100:
                runs = [*runs, [label]] if before == -100 else [*runs[:-1], [*runs[-1], label]]
            before = label
        found.append((tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]))
    return found


def chat(*contents, completion=None, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return Record("f:1", (*([{"role": "system", "content": system}] if system else []), *messages), completion)


texts = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1, max_size=24).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from(sorted(TEMPLATES)), st.booleans())
def test_the_answers_and_their_end_are_trained_and_nothing_else(pairs, template, last_only):
    contents = [content for pair in pairs for content in pair]
    [(whole, runs)] = encoded(chat(*contents), TEMPLATES[template], train_on="last" if last_only else "assistant")
    shown = {"trimming": lambda answer: answer.strip() + END, "llama2": lambda answer: f" {answer} {END.strip()}"}
    expected = [shown.get(template, lambda answer: answer + END)(answer) for _, answer in pairs]
    assert runs == (expected[-1:] if last_only else expected)
    tokenizer = shared_tokenizer()
    messages = list(chat(*contents).messages)
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4))
def test_a_template_that_rewrites_earlier_turns_gives_an_example_each(triples):
    contents = [c for asked, thought, said in triples for c in (asked, f"<think>{thought}</think>{said}")]
    found = encoded(chat(*contents), FORGETTING)
    assert [runs for _, runs in found] == [[answer + END] for answer in contents[1::2]]
    # Each stands behind what the model is given in use.
    tokenizer = shared_tokenizer()
    for number, (whole, [answer]) in enumerate(found):
        before = list(chat(*contents).messages[: 2 * number + 1])
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        assert whole == prompt + answer


def test_only_the_turns_that_are_rewritten_part_an_example():
    contents = ["q1", "a1", "q2", "<think>t</think>a2", "q3", "a3"]
    found = encoded(chat(*contents), FORGETTING)
    assert [runs for _, runs in found] == [["a1" + END, "<think>t</think>a2" + END], ["a3" + END]]


@pytest.mark.parametrize(
    ("train_on", "completion", "trained"),
    [
        ("completion", 3, ["a2"]),
        ("completion", None, ["a1", "a2"]),
        ("assistant", 3, ["a1", "a2"]),
        ("last", None, ["a2"]),
    ],
)
def test_train_on(train_on, completion, trained):
    [(_, runs)] = encoded(chat("q1", "a1", "q2", "a2", completion=completion), CHATML, train_on=train_on)
    assert runs == [answer + END for answer in trained]


def test_train_on_all_trains_every_token():
    [(whole, runs)] = encoded(chat("q1", "a1", "q2"), CHATML, train_on="all")
    assert runs == [whole]


def test_padding_with_the_end_token_does_not_hide_it():
    tokenizer = shared_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert encoded(chat("q", "a"), CHATML)[0][1] == [f"a{END}"]


@pytest.mark.parametrize("own", [None, "its own"])
def test_the_system_prompt_takes_the_place_of_the_rows_own(own):
    [(whole, runs)] = encoded(chat("q", "a", system=own), TEMPLATES["injecting"], system_prompt="Ours.")
    assert whole.startswith("<|im_start|>system\nOurs.<|im_end|>\n<|im_start|>user\nq<|im_end|>")
    assert runs == ["a" + END]
    assert "Be kind." in encoded(chat("q", "a"), TEMPLATES["injecting"])[0][0]


def test_a_generation_prompt_that_the_answer_does_not_keep():
    [(_, runs)] = encoded(chat("q", "a"), THINKING)
    assert runs == ["a" + END]


def test_a_template_may_refuse_a_row():
    renderer = ChatRenderer(shared_tokenizer())
    renderer.tokenizer.chat_template = LLAMA2
    with pytest.raises(RowProblem, match="refuses it: no system turns"):
        renderer.examples(chat("q", "a", system="s"))


def test_whether_turns_end_is_known(tokenizer):
    renderer = ChatRenderer(tokenizer)
    assert renderer.ends_turns(renderer.examples(chat("q", "a"))[0])
    tokenizer.chat_template = NO_END
    assert not renderer.ends_turns(renderer.examples(chat("q", "a"))[0])


def test_prompt_ends_before_the_last_answer(tokenizer):
    prompt = ChatRenderer(tokenizer).prompt(chat("q1", "a1", "q2", "a2"))
    assert prompt.endswith("a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n")


def test_templates_come_from_a_text_a_file_or_a_default(tokenizer, tmp_path):
    assert install_template(tokenizer) == ""
    assert "one given" in install_template(tokenizer, LLAMA2)
    assert tokenizer.chat_template == LLAMA2
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert "mine.jinja" in install_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == CHATML
    with pytest.raises(LoraConfigError, match="nor a file that exists"):
        install_template(tokenizer, "other.jinja")
    tokenizer.chat_template = None
    assert "no chat template" in install_template(tokenizer)
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(LoraConfigError, match="no eos_token"):
        install_template(tokenizer)


def test_the_default_template():
    [(whole, runs)] = encoded(chat("q1", "a1", "q2", "a2", system="s"), DEFAULT_CHAT_TEMPLATE)
    assert whole == (
        "### System:\ns\n\n### User:\nq1\n\n### Assistant:\na1<|im_end|>\n\n"
        "### User:\nq2\n\n### Assistant:\na2<|im_end|>\n\n"
    )
    assert runs == ["a1<|im_end|>\n\n", "a2<|im_end|>\n\n"]
