"""`lora-lightning generate`: what it writes is what transformers and PEFT write, and what cannot be is told."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning import LoraConfig, inject_lora, save_adapter
from lora_lightning.cli import generate
from lora_lightning.cli.talk import Conversation
from lora_lightning.cli.voices import _labels, load_voices
from lora_lightning.cli.which_adapter import Which, which_adapter
from lora_lightning.cli.written import Columns, Plain
from lora_lightning.errors import LoraConfigError
from lora_lightning.reports.texts import printable
from lora_lightning.tasks import ModelConfig, load_model
from lora_lightning.tasks.demo import prepare_demo
from lora_lightning.tasks.stream import Sampling

NAME = "demo:tiny-llama"
ASKED, AGAIN = "What colour is the ball?", "And the train?"
LENGTH = 12
FEW = ("--max-new-tokens", LENGTH)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with an adapter that changes what is said, and another adapter."""
    top = tmp_path_factory.mktemp("adapters")
    for name, seed in (("run/adapter", 0), ("other", 1)):
        model = load_model(ModelConfig(NAME), "causal_lm")
        inject_lora(model, LoraConfig(r=8, init_lora_weights=False, task_type="CAUSAL_LM"), seed=seed)
        save_adapter(model, top / name)
    shutil.copytree(prepare_demo(NAME), top / "run" / "adapter", dirs_exist_ok=True, ignore=_all_but_tokenizer)
    (top / "run" / "config.yaml").write_text(
        f"lora: {{}}\nmodel:\n  name: {NAME}\ndata:\n  system_prompt: Be short.\ntask:\n  _target_: any\n"
    )
    return top


def _all_but_tokenizer(_, names):
    return [name for name in names if not name.startswith(("tokenizer", "chat_template", "special"))]


@pytest.fixture(scope="module")
def reference(made):
    """What other libraries write: reference(messages, adapter folder or None)."""
    source = prepare_demo(NAME)
    tokenizer = AutoTokenizer.from_pretrained(source)

    def write(messages, adapter=None, template=None, **settings):
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        model = model if adapter is None else PeftModel.from_pretrained(model, made / adapter)
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        choices = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": tokenizer.pad_token_id} | settings
        output = model.generate(input_ids=ids, **choices)
        return printable(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    return write


@pytest.fixture(scope="module")
def voices(made):
    return load_voices([which_adapter(made / "run")])


def run(capsys, *arguments):
    capsys.readouterr()
    try:
        generate.main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as left:
        status = left.code
    return status, *capsys.readouterr()


def said(text):
    return [{"role": "user", "content": text}]


def blocks(stdout):
    """[(question, {name: answer})] of a transcript."""
    found = []
    for part in stdout.split("> ")[1:]:
        question, *answers = part.split("\n\n[")
        found.append((question, {each.partition("]\n")[0]: each.partition("]\n")[2].strip() for each in answers}))
    return found


def test_each_prompt_is_answered_by_both(made, reference, capsys):
    status, out, err = run(capsys, made / "run" / "adapter", "--system", "", *FEW, "--prompt", ASKED, "--prompt", AGAIN)
    assert status == 0, err
    expected = [
        (text, {"base": reference(said(text)), "adapter": reference(said(text), "run/adapter")})
        for text in (ASKED, AGAIN)
    ]
    assert blocks(out) == expected
    assert expected[0][1]["base"] != expected[0][1]["adapter"]


def test_lines_of_a_pipe_with_commands_and_the_runs_system_message(made, reference, capsys, monkeypatch):
    lines = f"{ASKED}\n\n/adapter\n/tokens 5\n{AGAIN}\n/quit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = run(capsys, made / "run", *FEW)
    assert status == 0, err
    system = [{"role": "system", "content": "Be short."}]
    first, second = blocks(out)
    assert first[1] == {
        "base": reference(system + said(ASKED)),
        "adapter": reference(system + said(ASKED), "run/adapter"),
    }
    assert second == (AGAIN, {"adapter": reference(system + said(AGAIN), "run/adapter", max_new_tokens=5)})


def test_several_adapters_are_compared(made, reference, capsys):
    status, out, err = run(
        capsys, made / "run", made / "other", made / "run" / "adapter", "--system", "", *FEW, "--prompt", ASKED
    )
    assert status == 0, err
    ours = reference(said(ASKED), "run/adapter")
    theirs = reference(said(ASKED), "other")
    expected = {"base": reference(said(ASKED)), "adapter": ours, "other": theirs, "adapter-2": ours}
    assert blocks(out) == [(ASKED, expected)]


def test_one_folder_may_be_written_in_two_ways(made, tmp_path, monkeypatch, capsys):
    """PEFT writes the base as it was given, and here a folder is told from a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepare_demo(NAME), "base")
    for adapter, name in (("theirs", "base"), ("ours", "./base")):
        config = Path(shutil.copytree(made / "other", adapter)) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    status, _, err = run(capsys, "theirs", "ours", *FEW, "--prompt", ASKED)
    assert status == 0, err


def test_names_tell_which_is_which():
    def names(*places):
        return _labels([Which(adapter, run and Path(run)) for adapter, run in places])

    one, two = ("/o/one/adapter", "/o/one"), ("/o/two/checkpoints/best-adapter", "/o/two")
    assert names(one, two) == ["one", "two"]
    assert names(one, ("/o/one/checkpoints/best-adapter", "/o/one"), two) == ["adapter", "best-adapter", "two"]
    assert names(("/o/a/0/adapter", "/o/a/0"), ("/o/b/0/adapter", "/o/b/0")) == ["a_0", "b_0"]
    assert names(("owner/base", None), ("other/base@v1", None)) == ["base-2", "base_v1"]


def test_each_is_asked_as_it_was_trained(made, reference, tmp_path, capsys):
    """A comparison: another chat template, and no system message."""
    other = shutil.copytree(made / "other", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(prepare_demo(NAME))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}!{% endfor %}"
    tokenizer.save_pretrained(other)
    status, out, err = run(capsys, made / "run", other, *FEW, "--prompt", ASKED)
    assert status == 0, err
    asked = [{"role": "system", "content": "Be short."}, *said(ASKED)]
    expected = {"base": reference(asked), "run": reference(asked, "run/adapter")}
    theirs = reference(said(ASKED), "other", template=tokenizer.chat_template)
    assert blocks(out) == [(ASKED, expected | {"other": theirs})]


def test_a_template_that_refuses_is_told(made, tmp_path, capsys):
    strict = shutil.copytree(made / "other", tmp_path / "strict")
    tokenizer = AutoTokenizer.from_pretrained(prepare_demo(NAME))
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}?"
    tokenizer.save_pretrained(strict)
    status, _, err = run(capsys, strict, "--system", "Be short.", "--prompt", ASKED)
    assert status == 1
    assert "refuses this conversation: no system role. To leave the system message out: --system ''" in err
    assert "Traceback" not in err


def test_an_interrupt_ends_a_pipe_without_a_traceback(made, capsys, monkeypatch):
    class Pipe(io.StringIO):
        def __iter__(self):
            yield ASKED
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Pipe())
    status, out, err = run(capsys, made / "run", *FEW)
    assert status == 130
    assert f"> {ASKED}" in out
    assert "Traceback" not in err


def test_a_conversation_has_a_history_a_side(voices, reference):
    talk = Conversation(voices, Sampling(max_new_tokens=LENGTH), "")
    talk.answer(ASKED, Plain())
    talk.answer(AGAIN, Plain())
    for name, adapter in (("base", None), ("adapter", "run/adapter")):
        first = reference(said(ASKED), adapter)
        history = [*said(ASKED), {"role": "assistant", "content": first}, *said(AGAIN)]
        assert talk._said[name] == [*history, {"role": "assistant", "content": reference(history, adapter)}]
    talk.obey("/reset")
    assert talk._said == {"base": [], "adapter": []}


def test_a_system_message_is_for_all_until_each_one_has_its_own_again(voices):
    talk = Conversation(voices, Sampling())
    for command, system in (("/system Be long.", ["Be long."]), ("/system", []), ("/system default", ["Be short."])):
        talk.obey(command)
        expected = [{"role": "system", "content": text} for text in system]
        assert talk._said == {"base": expected, "adapter": expected}


def test_an_interrupt_ends_the_answers_and_what_there_is_stays(voices):
    talk = Conversation(voices, Sampling(max_new_tokens=50), "")
    pieces = []

    class Interrupting(Plain):
        def answers(self, names):
            def heard(piece):
                pieces.append(piece)
                if len(pieces) == 3:
                    raise KeyboardInterrupt

            return _Given(lambda name: heard)

    with pytest.raises(KeyboardInterrupt):
        talk.answer(ASKED, Interrupting())
    assert talk._said["base"] == [*said(ASKED), {"role": "assistant", "content": "".join(pieces).strip()}]
    assert talk._said["adapter"] == []
    assert all(layer.lora_enabled for layer in voices.model.modules() if hasattr(layer, "lora_enabled"))


class _Given:
    def __init__(self, tell):
        self.tell = tell

    def __enter__(self):
        return self.tell

    def __exit__(self, *_):
        return False


def test_what_is_drawn_begins_from_the_seed(voices, capsys):
    def drawn(*commands):
        talk = Conversation(voices, Sampling(max_new_tokens=LENGTH), "")
        for command in ("/temperature 1.5", *commands):
            talk.obey(command)
        state = torch.get_rng_state()
        talk.answer(ASKED, Plain())
        assert torch.equal(torch.get_rng_state(), state)
        return talk._said["adapter"][-1]["content"]

    assert drawn("/seed 3") == drawn("/seed 3")
    assert drawn("/seed 3") != drawn("/seed 4")
    greedy = drawn("/temperature 0")
    assert drawn("/top_p 0.0001") == greedy


def test_texts_as_they_stand(made, capsys, voices):
    _, out, _ = run(capsys, made / "run", "--raw", "--only", "base", *FEW, "--prompt", "the minister")
    source = prepare_demo(NAME)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).eval()
    ids = tokenizer("the minister", return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, max_new_tokens=LENGTH, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert blocks(out) == [("the minister", {"base": printable(text).strip()})]


def test_columns_show_the_end_while_writing_and_the_whole_at_last():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=10, color_system=None)
    with Columns(console).answers(["base", "adapter"]) as tell:
        for number in range(30):
            tell("base")(f"line {number}\n")
        tell("adapter")("\x1b[2Jshort")
        growing = console.file.getvalue()
    whole = console.file.getvalue()[len(growing) :]
    assert "line 0 " not in growing.rpartition("line 29")[0].rpartition("…")[2]
    assert all(f"line {number} " in whole for number in range(30))
    assert "\x1b[2J" not in whole
    assert "short" in whole


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("/rset", "did you mean reset"),
        ("/temperature warm", "wants a number"),
        ("/temperature -1", "at least 0"),
        ("/top_p 0", "above 0"),
    ],
)
def test_wrong_commands_are_told_and_change_nothing(voices, command, part):
    talk = Conversation(voices, Sampling(), "")
    with pytest.raises(LoraConfigError, match=part):
        talk.obey(command)
    assert talk.sampling == Sampling()


def test_what_the_model_cannot_read_is_told(voices):
    talk = Conversation(voices, Sampling(), "")
    with pytest.raises(LoraConfigError, match="reads 512 at most"):
        talk.answer("ball " * 600, Plain())
    assert talk._said["base"] == []


def test_what_is_no_adapter_for_it_is_told(made, tmp_path, capsys):
    assert run(capsys, made, "--prompt", "x")[0] == 1
    status, _, err = run(capsys, tmp_path, "--prompt", "x")
    assert status == 1
    assert "there is no adapter" in err
    classifier = shutil.copytree(made / "other", tmp_path / "classifier")
    config = json.loads((classifier / "adapter_config.json").read_text())
    (classifier / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    status, _, err = run(capsys, classifier, "--prompt", "x")
    assert status == 1
    assert "lora-lightning eval" in err
    assert "Traceback" not in err


def test_another_base_is_told(made, tmp_path, capsys):
    base = shutil.copytree(prepare_demo(NAME), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    model.save_pretrained(base)
    for adapters in ([made / "run"], [made / "run", made / "other"]):
        status, _, err = run(capsys, *adapters, "--base", base, *FEW, "--prompt", ASKED)
        assert status == 1
        assert "--any-base" in err
        status, _, err = run(capsys, *adapters, "--base", base, "--any-base", *FEW, "--prompt", ASKED)
        assert status == 0, err
