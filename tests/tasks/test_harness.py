"""Tasks of lm-eval on a model in memory, against likelihoods reckoned by hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, lora_disabled
from lora_lightning.tasks import ModelConfig, load_model, load_tokenizer
from lora_lightning.tasks.harness import Figure, Harness

NAME = ModelConfig("demo:tiny-llama")


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = load_model(NAME, "causal_lm"), load_tokenizer(NAME)
    inject_lora(model, LoraConfig(r=8, init_lora_weights=False), seed=1)
    return model, tokenizer


def accuracy(model, tokenizer, rows):
    """The share of rows whose right choice is the likeliest continuation, one choice after the other."""
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logits[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(rows)


def test_base_and_adapter_are_asked_the_same(adapted, colours):
    model, tokenizer = adapted
    harness = Harness(["colours"], tasks_path=colours.folder)
    model.train()
    state = torch.get_rng_state()
    with lora_disabled(model):
        base = harness.measure(model, tokenizer)
    both = base, harness.measure(model, tokenizer)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    with lora_disabled(model):
        expected = [accuracy(model, tokenizer, colours.rows)]
    expected.append(accuracy(model, tokenizer, colours.rows))
    assert expected[0] != expected[1]
    for measured, value in zip(both, expected, strict=True):
        (figure,) = measured.values()
        assert measured.keys() == {"colours acc"}
        assert figure == Figure(pytest.approx(value), pytest.approx((value * (1 - value) / 7) ** 0.5), True)


def test_a_head_that_was_trained_by_itself_stays(colours):
    model, tokenizer = load_model(NAME, "causal_lm"), load_tokenizer(NAME)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    head = model.lm_head.weight.clone()
    Harness(["colours"], tasks_path=colours.folder, limit=1).measure(model, tokenizer)
    assert torch.equal(model.lm_head.weight, head)
    assert "tie_weights" not in vars(model)


def test_some_questions_only(adapted, colours):
    model, tokenizer = adapted
    model.eval()
    measured = Harness(["colours"], tasks_path=colours.folder, limit=3).measure(model, tokenizer)
    assert measured["colours acc"].value == pytest.approx(accuracy(model, tokenizer, colours.rows[:3]))


def test_what_there_is_not_and_what_the_network_does_not_give_is_told(adapted):
    with pytest.raises(LoraConfigError, match=r"'arc_esy' .did you mean arc_easy"):
        Harness(["arc_esy", "arc_easy"])
    with pytest.raises(LoraConfigError, match="questions of arc_easy cannot be had"):
        Harness(["arc_easy"]).measure(*adapted)


@pytest.mark.parametrize(("fields", "part"), [({"limit": 0}, "above 0"), ({"tasks_path": "/nowhere"}, "no folder")])
def test_wrong_settings_are_told(fields, part):
    with pytest.raises(LoraConfigError, match=part):
        Harness(["arc_easy"], **fields)


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraConfigError, match=r"pip install lora-lightning\[lm-eval\]"):
        Harness(["arc_easy"])
