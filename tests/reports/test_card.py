"""Model cards: read back by huggingface_hub, and free of what is nobody's business."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from lora_lightning import AdapterError, LoraConfig, inject_lora, resize_adapter, save_adapter
from lora_lightning.adapters.folder import chain_of
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli import export
from lora_lightning.config import TASK_TYPES
from lora_lightning.injection.state import record_of, the_root
from lora_lightning.reports.card import Subject, model_card, write_card
from lora_lightning.reports.card_parts import table
from lora_lightning.tasks.task_types import of_task_type
from lora_lightning.tasks.tiny_llama import write_tiny_llama

RESULT = {
    "status": "finished",
    "val_loss_before": 4.41,
    "val_loss": 2.53,
    "test_accuracy": 0.75,
    "steps": 60,
    "seconds": 262.0,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_399_488,
}
SAMPLES = [
    {"title": "Before", "step": 0, "samples": [{"prompt": "A | B <b>", "written": "\x1b[2J", "reference": "C"}]},
    {"title": "After", "step": 60, "samples": [{"prompt": "A | B <b>", "written": "two\nlines", "reference": "C"}]},
]


@pytest.fixture
def run(tmp_path, llama):
    """The folder of a run over a base of this machine."""
    folder = tmp_path / "run"
    inject_lora(llama, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]))
    llama.name_or_path = "/home/me/models/tiny"
    save_adapter(llama, folder / "adapter")
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "about.json").write_text(json.dumps({"environment": {"python": "3.11", "device": "one"}}))
    (folder / "config.yaml").write_text(
        "model: {name: /home/me/models/tiny}\n"
        "data: {_target_: lora_lightning.data.TextData, path: /home/me/rows.jsonl, batch_size: 4}\n"
        "task: {_target_: lora_lightning.tasks.CausalLM}\n"
        "lora: {r: 4, lora_alpha: 8, use_rslora: true}\n"
    )
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in SAMPLES))
    (folder / "loss.png").write_bytes(b"png")
    return folder


def test_the_hub_reads_the_header(run, tmp_path):
    (tmp_path / "out").mkdir()
    write_card(Subject(run / "adapter", "me/headlines", run=run), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "headlines"
    metrics = {(each.dataset_split, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert metrics == {("validation", "loss"): 2.53, ("test", "accuracy"): 0.75}
    assert {each.dataset_name for each in card.data.eval_results} == {"rows.jsonl"}
    assert (tmp_path / "out/loss.png").read_bytes() == b"png"


def test_it_tells_what_people_want_to_know(run):
    card = model_card(Subject(run / "adapter", "me/headlines", run=run), pictures=["loss.png"])
    assert "A LoRA adapter over tiny: rank 4, alpha 8 (scale 4, rank-stabilised)" in card
    assert "| Validation loss | 4.41 | 2.53 | −43 % |" in card
    assert "![Training and validation loss](loss.png)" in card
    assert "| A &#124; B &#60;b> | \N{REPLACEMENT CHARACTER}&#91;2J | two lines | C |" in card
    assert 'PeftModel.from_pretrained(model, "me/headlines")' in card
    assert "| python | 3.11 |" in card
    assert "trains 3.50 % (4.88 M of 139 M parameters)" in card


def test_no_path_of_this_machine_is_told(run):
    assert "/home/me" not in model_card(Subject(run / "adapter", "me/headlines", run=run))


def test_another_adapter_than_the_last_one_is_not_given_its_figures(run):
    resize_adapter(run / "adapter", run / "adapter-r2", r=2)
    card = model_card(Subject(run / "adapter-r2", "small", run=run))
    assert "model-index" not in card
    assert "These figures are of the adapter that the training ended with, not of this one." in card
    assert "Cut down from rank 4; " in card
    made = model_card(Subject(run / "adapter-r2", "small", run=run, origin=run / "adapter"))
    assert "not of this one" not in made


def test_a_file_that_is_not_here_is_no_data_set_of_the_hub(run):
    text = (run / "config.yaml").read_text().replace("/home/me/rows.jsonl", "data/rows.jsonl")
    (run / "config.yaml").write_text(text)
    assert ModelCard(model_card(Subject(run / "adapter", "small", run=run))).data.datasets is None


def test_a_data_set_of_the_hub_is_linked(run):
    text = (run / "config.yaml").read_text().replace("/home/me/rows.jsonl", "someone/rows")
    (run / "config.yaml").write_text(text)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "demo:smollm2-135m-instruct", "task_type": "SEQ_CLS"}
    (run / "adapter/adapter_config.json").write_text(json.dumps(config))
    card = ModelCard(model_card(Subject(run / "adapter", "small", run=run)))
    assert card.data.datasets == ["someone/rows"]
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in card.data.tags
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in card.text


@pytest.mark.parametrize(
    ("name", "shared", "loaded"),
    [("gpt2", True, "gpt2"), ("owner/base", True, "owner/base"), ("models/base", False, "path/to/base")],
)
def test_a_base_is_linked_where_others_find_it(run, tmp_path, monkeypatch, name, shared, loaded):
    monkeypatch.chdir(tmp_path)
    Path("models/base").mkdir(parents=True)
    config = json.loads((run / "adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": name}
    (run / "adapter/adapter_config.json").write_text(json.dumps(config))
    card = ModelCard(model_card(Subject(run / "adapter", "small", run=run)))
    assert card.data.base_model == (name if shared else None)
    assert ("huggingface.co" in card.text) == shared
    assert f'AutoModelForCausalLM.from_pretrained("{loaded}")' in card.text


def test_a_run_that_has_not_finished_says_so(run):
    (run / "result.json").unlink()
    card = model_card(Subject(run / "adapter", "small", run=run))
    assert "The training has not finished: its status is unfinished." in card
    assert "model-index" not in card


def test_without_a_run_the_adapter_speaks_for_itself(run):
    card = model_card(Subject(run / "adapter", "small"))
    assert "rank 4" in card
    assert "What came out" not in card
    assert "How it was trained" not in card


# ---- the code that it tells


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """Folders of base models, where the card's code looks for one of this machine; that of the test is the current."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained("path/to/bert")
    write_tiny_llama(tmp_path / "path/to/llama")
    return tmp_path / "path/to"


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def exported(model, tokenizer=None):
    """Write a model's adapter, export it, and give the card's two pieces of code, of which each loads it."""
    folder = save_adapter(model, "trained")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    export.main(["trained", "out"])
    with_peft, with_this = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)
    return with_peft, with_peft.rstrip().rpartition("\n")[0] + "\n" + with_this


def assert_loads(code, model, tokens, known=None):
    names = {}
    exec(code, names)
    found = names["model"].eval()
    with torch.no_grad():
        for new, old in zip(found(tokens).to_tuple(), model(tokens).to_tuple(), strict=True):
            if isinstance(old, torch.Tensor):
                torch.testing.assert_close(new[..., :known], old[..., :known], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "task", "settings"),
    [
        ("bert", "SEQ_CLS", {"num_labels": 5}),
        ("llama", "SEQ_CLS", {"num_labels": 3}),
        ("bert", "TOKEN_CLS", {"num_labels": 7}),
        ("bert", "QUESTION_ANS", {}),
        ("bert", "FEATURE_EXTRACTION", {}),
        ("llama", "CAUSAL_LM", {}),
    ],
)
def test_its_code_loads_the_adapter_of_any_task(bases, base, task, settings):
    loader = getattr(transformers, of_task_type(task).auto_class)
    model = moved(inject(loader.from_pretrained(bases / base, **settings), task_type=task))
    for code in exported(model):
        assert "AutoTokenizer" not in code  # none was exported
        assert_loads(code, model, torch.arange(9)[None])


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [-2, -1]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_its_code_makes_room_for_tokens_that_were_added(bases, fields):
    tokenizer = AutoTokenizer.from_pretrained(bases / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    rows = model.config.vocab_size
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows + 2 - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer))
    if "trainable_token_indices" in fields:
        fields = {"trainable_token_indices": [rows, rows + 1]}
    model = moved(inject(model, **fields))
    # What resizing draws at random is in no adapter over an embedding.
    tokens, known = ([5, 8, 7], rows) if "target_modules" in fields else ([5, rows, 7, rows + 1], None)
    for code in exported(model, tokenizer):
        assert_loads(code, model, torch.tensor([tokens]), known)


def test_its_code_folds_in_what_lies_below(bases):
    """Two runs' adapters, each called ``adapter``, in the folders of which the code speaks."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    save_adapter(moved(inject(load(bases / "llama"))), bases / "first/adapter")
    save_adapter(over(bases, "first/adapter"), bases / "second/adapter")
    model = over(bases, "second/adapter")
    for code in exported(model):
        assert_loads(code, model, torch.arange(9)[None])
    assert "with `first/adapter`, `second/adapter` folded in, in this order" in Path("out/README.md").read_text()


def over(bases, below):
    """A new adapter over the base with others folded in."""
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    chain = chain_of(bases / below)
    for each in chain:
        fold_in(model, each)
    inject(model)
    record_of(the_root(model)[1]).bases = chain
    return moved(model)


@pytest.mark.parametrize(
    ("below", "told", "loaded"),
    [
        ("/home/me/first", "first", '"path/to/first"'),
        ("/home/me/runs/1/adapter", "1/adapter", '"path/to/1/adapter"'),
        ("/home/me/runs/1/adapter/chat", "1/adapter/chat", '"path/to/1/adapter/chat"'),
        ("owner/first", "owner/first", '"owner/first"'),
        ("owner/first@v1", "owner/first@v1", '"owner/first", revision="v1"'),
    ],
)
def test_what_lies_below_is_told_as_others_have_it(run, below, told, loaded):
    path = run / "adapter/lora_lightning.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bases": [below]}))
    card = model_card(Subject(run / "adapter", "small", run=run))
    assert f"It goes over that base with `{told}` folded in" in card
    assert f"PeftModel.from_pretrained(model, {loaded}).merge_and_unload()" in card
    assert "/home/me" not in card


def inject(model, **fields):
    inject_lora(model, LoraConfig(r=4, **fields))
    return model


@pytest.mark.parametrize("task", TASK_TYPES)
def test_every_task_type_has_its_model(task):
    assert hasattr(transformers, of_task_type(task).auto_class)


def test_an_unknown_task_type_is_told():
    with pytest.raises(AdapterError, match=r"no task_type 'SEQ_CSL' \(did you mean SEQ_CLS"):
        of_task_type("SEQ_CSL")


# ---- texts of others


@pytest.mark.parametrize(
    "text",
    [
        "![x](https://somewhere.example/pixel.png)",
        "[a](javascript:alert(1)) *b* _c_ __c__ snake_case **d** ~~e~~ `f`",
        "a | b \\| c \\",
        "<img src=https://somewhere.example/pixel.png> <!-- &lt;b&gt;",
        "https://somewhere.example www.somewhere.example me@somewhere.example <https://somewhere.example>",
        "two\n\n# lines\n| --- |",
    ],
)
def test_texts_of_others_are_no_markup(text):
    written = table(("a", "b"), [(text, 1)])
    assert "://" not in written
    assert "www." not in written
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(written)
    cells = [each for each in page if each.type == "inline"]
    assert [each.content for each in cells][:2] == ["a", "b"]
    assert len(cells) == 4
    assert {part.type for part in cells[2].children} <= {"text", "text_special"}
    assert "".join(part.content for part in cells[2].children) == " ".join(text.split())
