"""Model cards: read back by huggingface_hub, and free of what is nobody's business."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from lora_lightning import LoraConfig, inject_lora, resize_adapter, save_adapter
from lora_lightning.reports.card import Subject, model_card, write_card

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
    assert "| A \\| B &lt;b> | \N{REPLACEMENT CHARACTER}[2J | two lines | C |" in card
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
