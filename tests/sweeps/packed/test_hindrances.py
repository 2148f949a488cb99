"""What cannot be trained with others is told, with the reason."""

from __future__ import annotations

import pytest
from torch import nn

from lora_lightning import LoraConfig, inject_lora, lora_disabled
from lora_lightning.injection.state import record_of
from lora_lightning.sweeps.packed.model import why_not_packed


def _why(model, **config):
    inject_lora(model, LoraConfig(**{"r": 2} | config), seed=0)
    return why_not_packed(model)


@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": ["q_proj"]}, {"use_rslora": True, "lora_dropout": 0.1}, {"rank_pattern": {"q_proj": 4}}],
)
def test_nothing_is_in_the_way_of_plain_lora(llama, config):
    assert _why(llama.train(), **config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoraLinear: only plain LoRA"),
        ({"target_modules": ["embed_tokens"]}, "LoraEmbedding: only plain LoRA"),
        ({"target_modules": ["lm_head"]}, "is the head"),
        ({"modules_to_save": ["norm"]}, "trains model.norm in full"),
    ],
)
def test_other_adapters(llama, config, reason):
    assert reason in _why(llama, **config)


def test_a_model_without_an_adapter(llama):
    assert "no adapter" in why_not_packed(llama)


def test_layers_of_gpt2(gpt2):
    assert "LoraConv1D: only plain LoRA" in _why(gpt2)


def test_biases_that_train():
    model = nn.Sequential(nn.Linear(3, 3))
    assert "in full" in _why(model, bias="lora_only")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.1), "attention_dropout=0.1"),
        (lambda m: m.model.add_module("drop", nn.Dropout(0.2)), "model.drop has a dropout of its own (p=0.2)"),
        (lambda m: m.model.add_module("bn", nn.BatchNorm1d(3).requires_grad_(False)), "running statistics"),
        (lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}), "gradient_checkpointing"),
        (lambda m: m.model.layers[0].compile(), "model.layers.0 is compiled"),
        (lambda m: m.model.norm.requires_grad_(True), "trains model.norm.weight beside"),
        (lambda m: setattr(m.config, "output_router_logits", True), "loss over all rows"),
        (lambda m: setattr(record_of(m), "bases", ("before",)), "folded"),
        (lambda m: m.model.layers[0].mlp.up_proj.register_forward_hook(print), "hooks"),
        (lambda m: m.model.layers[1].mlp.up_proj.register_forward_pre_hook(print), "layers.1.mlp.up_proj has hooks"),
        (lambda m: setattr(m.model.layers[0].mlp.up_proj, "lora_dropout", 0.5), "different lora_dropout"),
    ],
)
def test_what_is_in_the_way_of_a_model(llama, change, reason):
    inject_lora(llama.train(), LoraConfig(r=2), seed=0)
    assert why_not_packed(llama) is None
    change(llama)
    assert reason in why_not_packed(llama)


def test_an_adapter_that_is_switched_off(llama):
    inject_lora(llama, LoraConfig(r=2), seed=0)
    with lora_disabled(llama):
        assert "switched off" in why_not_packed(llama)
    assert why_not_packed(llama) is None
