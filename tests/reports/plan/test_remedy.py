from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import OpenAIGPTConfig

from lora_lightning import LoraConfig
from lora_lightning.reports.plan import Setting, plan_of, remedies
from lora_lightning.reports.plan.remedy import listed
from lora_lightning.tasks.model_config import ModelConfig

TINY = ModelConfig("demo:tiny-llama")
LORA = LoraConfig(r=2, target_modules=["q_proj"])
SHORT_AND_LONG = [10] * 95 + [64] * 5


def words(found):
    return [dict(word.split("=") for word in remedy.settings.split()) for remedy in found]


@pytest.mark.parametrize(
    ("changed", "offered"),
    [
        ({"lora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "strategy": "ddp", "devices": 2}, True),
        ({"strategy": "fsdp2", "devices": 2}, False),
        ({"lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")}, False),
    ],
    ids=["ddp-dora", "fsdp2", "pissa"],
)
def test_four_bits_where_train_takes_them_and_the_adapter_stays_the_users(changed, offered):
    setting = replace(Setting(TINY, LORA, rows=2, tokens=16, device="cuda", memory=10**9), **changed)
    found = words(remedies(setting))
    assert any("model.quantisation" in each for each in found) is offered
    assert not any("lora" in each for each in found)


@pytest.fixture(scope="module")
def of_various_lengths():
    setting = Setting(TINY, LORA, rows=16, tokens=256, accumulate=2)
    return setting, remedies(setting, SHORT_AND_LONG)


def test_packing_is_offered_where_padding_costs_memory(of_various_lengths):
    setting, remedies = of_various_lengths
    (found,) = (each for each in remedies if "data.packing" in each.settings)
    said = words([found])[0]
    rows, times = int(said["data.batch_size"]), int(said["trainer.accumulate_grad_batches"])
    packed = plan_of(replace(setting, rows=rows, padded=False), calibration=False)
    padded = plan_of(replace(setting, tokens=64), calibration=False)
    assert found.total == packed.memory.total < padded.memory.total
    assert (rows, times) == (1, 2)  # 6 rows of 256 tokens hold all 100 examples: a step's 32 are 1.9 rows
    assert "about 33 a step" in found.why


def test_rows_are_shortened_by_how_long_they_are(of_various_lengths):
    (found,) = (each for each in of_various_lengths[1] if "data.max_length" in each.settings)
    assert words([found])[0]["data.max_length"] == "32"
    assert "5.0% of the rows are longer" in found.why


@pytest.mark.parametrize(
    ("lengths", "changed"),
    [
        ([64] * 100, {}),  # nothing is padded, nor can be cut
        ([8] * 100, {}),  # one packed row would be of two steps
        (SHORT_AND_LONG, {"task": "sequence_classification"}),
    ],
    ids=["alike", "tiny", "classifier"],
)
def test_packing_is_not_offered_where_it_would_not_help(lengths, changed):
    setting = replace(Setting(TINY, LORA, rows=4, tokens=64), **changed)
    found = remedies(setting, lengths)
    assert not any("data.packing" in each.settings for each in found)
    assert any("data.max_length" in each.settings for each in found) is (lengths == SHORT_AND_LONG)


def test_what_a_model_cannot_do_is_left_out(tmp_path):
    OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=50).save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["c_attn"])
    found = words(remedies(Setting(ModelConfig(str(tmp_path)), config, rows=2, tokens=16)))
    assert [set(each) for each in found] == [
        {"data.batch_size", "trainer.accumulate_grad_batches"},
        {"data.max_length", "data.batch_size", "trainer.accumulate_grad_batches"},
    ]


def test_nothing_smaller():
    setting = Setting(replace(TINY, gradient_checkpointing=True), LORA, rows=1, tokens=3)
    assert remedies(setting) == []
    assert "smaller model" in listed([])
