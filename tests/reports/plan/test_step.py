"""Bytes that a plan reckons with fake tensors, beside those of a real step."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.reports.plan import step
from lora_lightning.reports.plan.ghost import Ghost, own_config
from lora_lightning.reports.plan.planned import adapted
from lora_lightning.reports.plan.setting import Setting
from lora_lightning.tasks.live_bytes import LiveBytes
from lora_lightning.tasks.loss import causal_lm_loss, classification_loss
from lora_lightning.tasks.model_config import ModelConfig

COMMON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, "num_hidden_layers": 3}
LLAMA = COMMON | {"intermediate_size": 160, "num_key_value_heads": 2}
SHAPES = {
    "llama": ("llama", LLAMA),
    "gemma2": ("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 8}),  # two kinds of attention, capped logits
}
BERT = COMMON | {"intermediate_size": 160, "num_labels": 3, "pad_token_id": 0}


def measured(model: torch.nn.Module, setting: Setting, *, mask: torch.Tensor) -> tuple[int, int]:
    """Bytes that are alive after a real forward, and the most in backward besides."""
    ids = torch.randint(1, 512, (setting.rows, setting.tokens))
    batch = {"input_ids": ids, "attention_mask": mask}
    trained = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes() as counter:
        if setting.task == "causal_lm":
            total = causal_lm_loss(model, batch | {"labels": ids}).total
        else:
            total = classification_loss(model, batch | {"labels": ids[:, 0] % 3}).total
        kept, counter.most = counter.now, counter.now
        torch.autograd.grad(total, trained, allow_unused=True)
    return kept, counter.most - kept


@pytest.mark.parametrize(("name", "padded"), [("llama", False), ("llama", True), ("gemma2", True), ("bert", False)])
def test_bytes_are_those_of_a_real_step(name, padded, tmp_path):
    family, numbers = SHAPES.get(name, ("bert", BERT))
    config = AutoConfig.for_model(family, **numbers)
    config.save_pretrained(tmp_path)
    task = "sequence_classification" if name == "bert" else "causal_lm"
    lora = LoraConfig(r=4)
    setting = Setting(ModelConfig(str(tmp_path)), lora, task=task, num_labels=3, rows=3, tokens=32, padded=padded)
    ghost, _ = adapted(setting, own_config(setting))
    cost = step.step_cost(ghost, setting, 2**33).of(3)

    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = auto.from_config(config).train()
    inject_lora(model, LoraConfig(r=4, task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM"))
    mask = torch.ones(3, 32, dtype=torch.long)
    if padded:
        mask[-1, -1] = 0
    measured(model, setting, mask=mask)  # the first step finds out what the head's logits are
    kept, backward = measured(model, setting, mask=mask)
    # What the loss leaves behind, a row of the model's width a token, is the loss's in a plan.
    assert cost.kept == pytest.approx(kept, rel=0.05)
    assert cost.kept + cost.backward == pytest.approx(kept + backward, rel=0.1)


def test_a_few_blocks_tell_of_all(tmp_path, monkeypatch):
    family, numbers = SHAPES["llama"]
    AutoConfig.for_model(family, **numbers).save_pretrained(tmp_path)
    lora = LoraConfig(r=4, lora_dropout=0.1, rank_pattern={"layers.1.mlp.up_proj": 9})
    setting = Setting(ModelConfig(str(tmp_path)), lora, rows=5, tokens=24)
    ghost, _ = adapted(setting, own_config(setting))
    few = step.step_cost(ghost, setting, 2**33).of(5)
    monkeypatch.setattr(step, "_MOST_KINDS", 0)
    whole = step.step_cost(ghost, setting, 2**33).of(5)
    assert few.kept == whole.kept
    assert few.flops == whole.flops
    assert few.moved == whole.moved
    assert few.loss == whole.loss
    assert len(ghost.model.model.layers) == 3


def test_recomputed_activations_take_less(tmp_path):
    AutoConfig.for_model("llama", **LLAMA).save_pretrained(tmp_path)
    kept, flops = {}, {}
    for again in (False, True):
        setting = Setting(ModelConfig(str(tmp_path), gradient_checkpointing=again), LoraConfig(), tokens=64)
        ghost, _ = adapted(setting, own_config(setting))
        cost = step.step_cost(ghost, setting, 2**33).of(4)
        kept[again], flops[again] = cost.kept, cost.flops
    assert kept[True] < kept[False] / 4
    assert flops[False] < flops[True] < 2 * flops[False]


def test_flops_of_a_token_are_four_for_each_weight(tmp_path):
    """Two for the product, two for the gradient of its input; the frozen weights want none."""
    AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=False).save_pretrained(tmp_path)
    setting = Setting(ModelConfig(str(tmp_path)), LoraConfig(r=1), rows=1, tokens=2)
    ghost, _ = adapted(setting, own_config(setting))
    weights = sum(p.numel() for n, p in ghost.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    cost = step.step_cost(ghost, setting, 2**33).of(1)
    assert cost.flops / 2 == pytest.approx(4 * weights, rel=0.1)


def test_a_loss_in_chunks_takes_no_more_than_a_chunk(tmp_path):
    AutoConfig.for_model("llama", **LLAMA).save_pretrained(tmp_path)
    setting = Setting(ModelConfig(str(tmp_path)), LoraConfig(), rows=2, tokens=64)
    ghost, _ = adapted(setting, own_config(setting))
    whole, chunks = (step.step_cost(ghost, setting, free).of(2).loss for free in (2**33, 8 * 10_000))
    assert whole - chunks == 2 * 64 * 512 * 4 - 10_000
    assert isinstance(ghost, Ghost)
