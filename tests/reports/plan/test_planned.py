from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, save_adapter
from lora_lightning.injection.starts.residual import starts_of, weight_before
from lora_lightning.injection.state import lora_layers
from lora_lightning.reports.plan import Setting, comparison, plan, remedies
from lora_lightning.reports.plan.ghost import own_config
from lora_lightning.reports.plan.memory import available
from lora_lightning.reports.plan.planned import adapted
from lora_lightning.reports.plan.setting import bytes_of
from lora_lightning.reports.plan.spread import dequantised, held
from lora_lightning.reports.plan.table import size
from lora_lightning.tasks.model_config import ModelConfig

TINY = {"rows": 4, "tokens": 64, "calibration": False}
GPUS = {"device": "cuda", "memory": 24 * 10**9, "calibration": False}


@pytest.fixture(scope="module")
def tiny():
    return plan("demo:tiny-llama", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), **TINY)


def real(config: LoraConfig, **settings):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    return model, inject_lora(model, config)


SMALL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("shape")
    LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=8, lora_alpha=16),
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 6}),
        LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["lm_head"], bias="lora_only"),
        LoraConfig(r=8, init_lora_weights="pissa", use_dora=True),
        LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ],
    ids=["all-linear", "dora", "modules-to-save", "pissa-dora", "tied", "tied-modules-to-save"],
)
def test_layers_and_the_file_are_those_of_the_real_model(tmp_path, config):
    shape = SMALL | {"tie_word_embeddings": config.ensure_weight_tying}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    made = plan(str(tmp_path), config, **TINY)  # a folder with a config.json and nothing else
    model, report = real(config, **shape)
    assert made.report == report
    assert sum(kind.count for kind in made.adapted) == len(report.rows)
    assert sum(kind.parameters for kind in made.adapted) == report.trainable_parameters
    file = save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    assert made.file_bytes == file.stat().st_size


def test_what_is_not_adapted_is_told(tiny):
    left = {kind.name: kind.count for kind in tiny.left_out}
    assert left == {
        "embed_tokens": 1,
        "k_proj": 2,
        "o_proj": 2,
        "gate_proj": 2,
        "up_proj": 2,
        "down_proj": 2,
        "lm_head": 1,
    }


def test_held_memory_is_counted_in_bytes(tiny):
    trained = tiny.report.trainable_parameters
    memory = tiny.memory
    assert memory.adapter == memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    base = 4 * (tiny.report.total_parameters - trained)
    assert base <= memory.weights <= base + 4096  # buffers of the rotary embedding
    assert memory.total == pytest.approx(
        memory.weights + 4 * memory.adapter + 1.4 * (memory.activations + max(memory.loss, memory.backward))
    )


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_that_changes_the_base_keeps_it(folder, start):
    lora = LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj", "down_proj"])
    plain, made = (plan(str(folder), replace(lora, init_lora_weights=how), **TINY) for how in (True, start))
    model, _ = real(lora, **SMALL)
    layers = [layer for _, layer in lora_layers(model)]
    kept = sum(weight_before(layer).nbytes for layer in layers)
    starts = sum(tensor.nbytes for layer in layers for tensor in starts_of(layer).values())
    assert kept > 0
    assert made.memory.weights - plain.memory.weights == kept + starts
    on_gpu = plan(str(folder), lora, rows=1, tokens=16, **GPUS)
    assert on_gpu.memory.weights - plain.memory.weights == starts
    assert "main memory" in " ".join(on_gpu.notes)


def test_an_optimizer_that_leaves_a_alone_spares_inputs_of_layers(folder):
    whole, half = (plan(str(folder), LoraConfig(r=4, lora_dropout=0.1), frozen_a=f, **TINY) for f in (False, True))
    assert half.report == whole.report  # which is of the injection
    assert half.memory.gradients < whole.memory.gradients
    assert half.memory.adapter == whole.memory.adapter
    assert half.memory.activations < whole.memory.activations
    spread = {"rows": 1, "tokens": 16, "strategy": "fsdp2", "devices": 2, **GPUS}
    whole, half = (plan(str(folder), LoraConfig(r=4), frozen_a=f, **spread) for f in (False, True))
    assert half.memory.gathered == whole.memory.gathered  # the base's alone


def test_processes_of_one_machine_share_its_memory(folder):
    settings = {"model": ModelConfig(str(folder)), "lora": LoraConfig(), "strategy": "ddp", "devices": 8}
    one, two, all_of_it = (available(Setting(**settings, nodes=nodes)) for nodes in (1, 2, 8))
    assert 8 * one == pytest.approx(all_of_it, rel=0.2)  # others run on this machine too
    assert 4 * two == pytest.approx(all_of_it, rel=0.2)


def test_what_each_process_reads_before_the_base_is_spread_is_told(folder):
    settings = {"rows": 1, "tokens": 16, "strategy": "fsdp2", "devices": 4, **GPUS}
    assert "each of 4 processes of a machine reads the whole base" in " ".join(plan(str(folder), **settings).notes)
    assert plan(str(folder), **settings | {"devices": 1}).notes == []


def test_no_weight_is_read_and_large_models_take_no_memory():
    made = plan("shape:llama-70b", rows=1, tokens=4096, device="cuda", memory=80 * 10**9, calibration=False)
    assert made.report.total_parameters - made.report.trainable_parameters == 70_553_706_496
    assert made.memory.weights == pytest.approx(2 * 70.55e9, rel=0.001)
    assert made.fits is False
    assert made.largest_batch == 0


@pytest.fixture(scope="module")
def ghost(folder):
    setting = Setting(ModelConfig(str(folder)), LoraConfig())
    return adapted(setting, own_config(setting))[0].model


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("ddp", 1, 1, 1),
        ("fsdp", 4, 1, 1),
        ("fsdp2", 4, 1, 1),
        ("deepspeed_1", 1, 1, 4),
        ("deepspeed_2", 1, 4, 4),
        ("deepspeed_3", 4, 4, 4),
    ],
)
def test_strategies_spread_what_they_spread(folder, ghost, strategy, weights, gradients, optimizer):
    settings = {"model": ModelConfig(str(folder)), "lora": LoraConfig()}
    one = held(ghost, Setting(**settings))
    spread = held(ghost, Setting(**settings, strategy=strategy, devices=4))
    assert spread.weights == pytest.approx(one.weights / weights, rel=0.01)
    assert spread.gradients == one.gradients / gradients
    assert spread.optimizer == one.optimizer / optimizer
    assert spread.adapter == one.adapter
    assert (spread.gathered > 0) == (weights > 1)


def test_tensor_parallel_divides_layers_and_their_activations(folder):
    one = plan(str(folder), rows=1, tokens=32, **GPUS).memory
    two = plan(str(folder), rows=1, tokens=32, strategy="tp", devices=2, tensor_parallel=2, **GPUS).memory
    assert 0.5 * one.weights < two.weights < 0.7 * one.weights
    assert 0.5 * one.adapter < two.adapter < one.adapter
    assert 0.4 * one.activations < two.activations < one.activations
    with pytest.raises(LoraConfigError, match="num_key_value_heads=2 cannot be divided by 4"):
        plan(str(folder), rows=1, tokens=32, strategy="tp", devices=4, tensor_parallel=4, **GPUS)


def test_few_bits_a_weight(folder, ghost):
    few, plain = (
        held(ghost, Setting(ModelConfig(str(folder), quantisation=how), LoraConfig())).weights for how in ("nf4", None)
    )
    kept = 4 * 2 * 320 * 48  # embedding and output layer
    assert (few - kept) / (plain - kept) == pytest.approx((4 + 0.127) / 32, rel=0.05)
    quantised = Setting(ModelConfig(str(folder), quantisation="nf4"), LoraConfig())
    assert dequantised(ghost, quantised, torch.float32) == 4 * 48 * 112


def test_the_largest_batch_fits_and_the_next_one_does_not(folder):
    made = plan(str(folder), rows=2, tokens=64, memory=200 * 10**6, calibration=False)
    most = made.largest_batch
    assert made.with_rows(most).total <= 0.9 * 200e6 < made.with_rows(most + 1).total
    assert made.fits
    there = plan(str(folder), rows=most, tokens=64, memory=200 * 10**6, calibration=False).memory
    assert there.total == pytest.approx(made.with_rows(most).total, rel=0.001)


def test_a_plan_is_plain_numbers_and_a_table(tiny):
    content = json.loads(json.dumps(tiny.to_dict()))
    assert content["trainable_parameters"] == tiny.report.trainable_parameters
    assert content["memory"]["total"] == tiny.memory.total
    assert content["setting"]["lora"]["r"] == 4
    text = str(tiny)
    for words in (
        "q_proj",
        "cpu, base in float32",
        "Not adapted",
        "k_proj",
        "Activations",
        "Largest batch",
        size(tiny.file_bytes),
    ):
        assert words in text


def test_side_by_side(folder):
    plans = {f"r={r}": plan(str(folder), LoraConfig(r=r), **TINY) for r in (2, 8)}
    table = comparison(plans)
    assert [column.header for column in table.columns] == ["", "r=2", "r=8"]
    assert next(iter(table.columns[2].cells)) == "8"


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # whose linear layers are no nn.Linear
def test_a_calibrated_plan_tells_time(folder, tmp_path, family):
    gpt2 = GPT2Config(n_layer=1, n_embd=48, n_head=4, vocab_size=200, architectures=["GPT2LMHeadModel"])
    gpt2.save_pretrained(tmp_path)
    made = plan(str(folder if family == "llama" else tmp_path), rows=2, tokens=32)
    assert made.seconds_per_1000_steps > 0
    assert math.isfinite(made.seconds_per_1000_steps)


def test_a_model_whose_code_wants_numbers_is_planned_as_far_as_can_be(folder, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda self, input_ids, **kw: forward(self, input_ids[:, : int(input_ids.sum()) + 1], **kw),
    )
    made = plan(str(folder), **TINY)
    assert made.memory.activations is None
    assert made.fits is None
    assert made.memory.weights > 0
    assert "asks for numbers" in " ".join(made.notes)
    assert "not known" in str(made)
    assert "At least" in str(made)
    assert "at least" in [*comparison({"one": made}).columns[1].cells][6]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(LoraConfigError, match=r"did you mean fsdp2?.*\n.*precision"):
        Setting(ModelConfig("x"), LoraConfig(), strategy="fsdp22", precision="32")
    with pytest.raises(LoraConfigError, match="did you mean llama-8b"):
        plan("shape:llama8b")
    with pytest.raises(LoraConfigError, match="did you mean q_proj"):
        plan("demo:tiny-llama", LoraConfig(target_modules=["q_porj"]), **TINY)
    with pytest.raises(LoraConfigError, match="memory must be a size"):
        bytes_of("much")
    BertConfig(architectures=["X"], num_hidden_layers=1, hidden_size=30, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_000_000)
    with pytest.raises(LoraConfigError, match=r"cannot be built without its weights.*0\.002 GB"):
        plan(str(tmp_path), **TINY)


def test_remedies_keep_the_rows_of_a_step(folder):
    setting = Setting(ModelConfig(str(folder)), LoraConfig(), rows=12, tokens=32, accumulate=2, memory=10**9)
    found = remedies(setting)
    first = dict(word.split("=") for word in found[0].settings.split())
    rows, times = int(first["data.batch_size"]), int(first["trainer.accumulate_grad_batches"])
    assert rows * times == 24
    assert rows < 12
    before = plan(setting.model, setting.lora, rows=12, tokens=32, memory=10**9, calibration=False)
    assert found[0].total <= 0.7 * before.memory.total
    assert any("gradient_checkpointing" in remedy.settings for remedy in found)
