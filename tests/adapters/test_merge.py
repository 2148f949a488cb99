"""Merging: the mathematics in float64, all of it or nothing, tied weights, and what is told of it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    MergeReport,
    inject_lora,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.state import injected_roots, lora_layers
from lora_lightning.layers import LoraLayer


def small(dtype=torch.float64):
    """An embedding and three linear layers."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 8), nn.Linear(8, 3)).to(dtype)


def adapted(model, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks wider than a layer
        inject_lora(model, LoraConfig(**{"r": 2, "init_lora_weights": False, **fields}))
    return model


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(bits(now[name]), bits(before[name])) for name in before)


def bits(value):
    return value.contiguous().view(torch.uint8)  # in which a NaN is equal to itself


@settings(max_examples=25, deadline=None)
@given(
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    fields=st.fixed_dictionaries({"use_rslora": st.booleans(), "use_dora": st.booleans()}),
    targets=st.sampled_from([["0", "1", "3", "4"], ["0"], ["1", "4"]]),
)
def test_the_merged_model_gives_the_adapted_outputs(r, alpha, fields, targets):
    model = adapted(small(), r=r, lora_alpha=alpha, target_modules=targets, **fields)
    x = torch.arange(11)
    wanted = model(x)
    report = merge_lora(model, check_on=x)
    assert [type(part) for part in model] == [nn.Embedding, nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    assert report.difference == (model(x) - wanted).abs().max().item()
    assert [tensor.name for tensor in report.tensors] == [f"{name}.weight" for name in targets]


def test_conv1d_of_transformers_is_merged(gpt2, tokens):
    model = adapted(gpt2.double(), target_modules=["c_attn", "c_proj", "c_fc"])
    wanted = model(tokens).logits
    merge_lora(model)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_is_rounded_once_and_the_loss_is_told(dtype, exact):
    model = adapted(small(dtype), target_modules=["1", "3"], lora_alpha=1)
    wide = torch.float64 if exact else torch.float32
    values = {}
    for name, layer in lora_layers(model):
        a, b, weight = layer.lora_A.to(wide), layer.lora_B.to(wide), layer.weight.to(wide)
        values[name] = weight, weight + layer.lora_scaling * (b @ a)
    report = merge_lora(model, exact=exact)
    for tensor in report.tensors:
        weight, merged = values[tensor.name.removesuffix(".weight")]
        rounded = model.get_parameter(tensor.name)
        assert rounded.dtype is dtype
        assert torch.equal(rounded, merged.to(dtype))
        assert tensor.change == pytest.approx(((merged - weight).norm() / weight.norm()).item(), rel=1e-4)
        lost = (rounded.to(wide) - merged).norm() / (merged - weight).norm()
        assert tensor.rounding == pytest.approx(lost.item(), rel=1e-4)
        assert 0 < tensor.rounding < 0.1
    assert "rounding has taken up to" in str(report)


def test_a_float32_base_loses_next_to_nothing():
    report = merge_lora(adapted(small(torch.float32), target_modules=["1", "3"]))
    assert all(tensor.rounding == 0 for tensor in report.tensors)
    assert "rounding" not in str(report)
    exactly = merge_lora(adapted(small(torch.float32), target_modules=["1", "3"]), exact=True)
    assert all(0 < tensor.rounding < 1e-5 for tensor in exactly.tensors)


# ---- all or nothing


class Broken(Exception):
    """Something that is not foreseen."""


def breaking_at(method, number, error):
    """A method of layers that fails at its call of that number."""
    original, calls = getattr(LoraLayer, method), []

    def fail(self, *arguments):
        calls.append(self)
        if len(calls) > number:
            raise error
        return original(self, *arguments)

    return fail


@pytest.mark.parametrize("method", ["lora_delta_of", "lora_base_value", "lora_write", "lora_keep", "lora_merged"])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("error", [Broken("boom"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_everything_as_it_was(monkeypatch, method, number, error):
    model = adapted(small(), target_modules=["0", "1", "3", "4"])
    x, before, classes = torch.arange(11), state_of(model), [type(part) for part in model]
    wanted = model(x)
    with monkeypatch.context() as patched:
        patched.setattr(LoraLayer, method, breaking_at(method, number, error))
        with pytest.raises(type(error)):
            merge_lora(model)
    assert same(model, before)
    assert [type(part) for part in model] == classes
    assert torch.equal(model(x), wanted)
    assert len(lora_parameters(model)) == 8
    merge_lora(model)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_every_layer_that_would_not_be_finite_is_named(value):
    model = adapted(small(), target_modules=["0", "1", "3"])
    with torch.no_grad():
        model[1].lora_B[0, 0] = value
        model[3].lora_A[1, 1] = value
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"not be finite in 1, 3$"):
        merge_lora(model)
    assert same(model, before)
    assert injected_roots(model)


def test_an_overflow_of_half_precision_is_refused_before_it_is_written():
    model = adapted(small(torch.float16), target_modules=["1", "3"])
    with torch.no_grad():
        model[3].lora_B.fill_(300.0)
        model[3].lora_A.fill_(300.0)
    before = state_of(model)
    with pytest.raises(AdapterError, match="not be finite in 3"):
        merge_lora(model)
    assert same(model, before)


def test_without_copies_the_result_is_the_same():
    models = [adapted(small(), target_modules=["0", "1", "3", "4"]) for _ in range(2)]
    merge_lora(models[0])
    merge_lora(models[1], safe=False)
    assert same(models[1], state_of(models[0]))


# ---- tied weights


@pytest.fixture
def tied():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]]
)
def test_a_tied_weight_is_refused_or_untied(tied, tokens, tmp_path, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(tied, target_modules=targets)
    wanted, before = model(tokens).logits, state_of(model)
    with pytest.raises(AdapterError, match=r"tied to .*merge_lora\(model, untie=True\) .* 2,048 parameters more"):
        merge_lora(model)
    assert same(model, before)
    with pytest.warns(UserWarning, match="untied before merging"):
        report = merge_lora(model, untie=True, check_on={"input_ids": tokens})
    assert report.difference < 1e-10
    assert len(report.untied) == 1
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-10, atol=1e-10)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


def test_what_is_untied_is_tied_again_where_merging_fails(tied, tokens, monkeypatch):
    model = adapted(tied, target_modules=["lm_head", "q_proj"])
    wanted, before = model(tokens).logits, state_of(model)
    with monkeypatch.context() as patched:
        patched.setattr(LoraLayer, "lora_write", breaking_at("lora_write", 1, Broken("boom")))
        with pytest.raises(Broken), pytest.warns(UserWarning, match="untied"):
            merge_lora(model, untie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert same(model, before)
    assert torch.equal(model(tokens).logits, wanted)
    unload_lora(model)


def test_adapters_that_change_a_tied_weight_alike_are_merged_once(tied, tokens):
    model = adapted(tied, target_modules=["lm_head", "embed_tokens"])
    embedding, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        head.lora_A.copy_(embedding.lora_B.t())
        head.lora_B.copy_(embedding.lora_A.t())
    wanted = model(tokens).logits
    merge_lora(model)
    assert head.weight is embedding.weight
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


def test_magnitudes_of_a_tied_weight_are_not_alike_where_updates_are(tied, tokens):
    model = adapted(tied, target_modules=["lm_head", "embed_tokens"], use_dora=True)
    with torch.no_grad():
        model.lm_head.lora_B.zero_()
        model.model.embed_tokens.lora_A.zero_()
        model.lm_head.lora_magnitude.mul_(1.5)
    wanted = model(tokens).logits
    with pytest.raises(AdapterError, match="tied to"):
        merge_lora(model)
    with pytest.warns(UserWarning, match="untied before merging"):
        merge_lora(model, untie=True)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


class Scaled(LlamaForCausalLM):
    """A model that computes in another way where its head is tied, as T5 does."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        return out.logits * 0.5 if self.config.tie_word_embeddings else out.logits


def test_a_model_that_reads_the_flag_is_not_untied(tied):
    model = adapted(Scaled(tied.config), target_modules=["lm_head"])
    with pytest.raises(AdapterError, match="Scaled scales its outputs by whether tie_word_embeddings is set"):
        merge_lora(model, untie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- what is told


def test_the_report_is_a_line_for_people(llama, tokens):
    llama.train()
    inject_lora(llama, LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5))
    modes = {name: module.training for name, module in llama.named_modules()}
    report = merge_lora(llama, check_on=(tokens,))
    assert isinstance(report, MergeReport)
    assert report.difference < 1e-4  # dropout was off, though the model was in train mode
    assert {name: module.training for name, module in llama.named_modules()} == modes
    assert str(report).startswith("14 weights merged, moved by up to ")
    assert "outputs differ by at most" in str(report)


class Scales(nn.Linear):
    """A linear layer of a library that is not known here: numbers in 8 bits, and a scale."""

    def __init__(self, plain, dtype):
        super().__init__(plain.in_features, plain.out_features)
        self.scale = plain.weight.detach().abs().max() / 100
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(dtype), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_that_only_their_class_knows_are_left_alone(dtype):
    plain = nn.Sequential(Scales(nn.Linear(16, 16), dtype), nn.Linear(16, 4))
    model = adapted(copy.deepcopy(plain))
    x = torch.randn(3, 16)
    wanted, before = model(x), [type(part) for part in plain.modules()]
    with pytest.raises(AdapterError, match=rf"0 keeps its weight in {dtype}, and only its class knows"):
        merge_lora(model)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    for more in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(LoraConfigError, match=f"stored as Parameter of {dtype}"):
            inject_lora(plain, LoraConfig(r=2, **more))
        assert [type(part) for part in plain.modules()] == before
        assert not [name for name, _ in plain.named_parameters() if "lora" in name]


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"modules_to_save": ["3"]}])
def test_a_switched_off_adapter_is_neither_merged_nor_taken_off_nor_saved(fields, tmp_path):
    """The base's values are shown then, and would be taken for trained ones."""
    model = adapted(small(), target_modules=["1"], **fields)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1)
    tokens = torch.arange(5)
    wanted, before = model(tokens), state_of(model)
    for act in (merge_lora, unload_lora, lambda model: save_adapter(model, tmp_path / "adapter")):
        with lora_disabled(model), pytest.raises(AdapterError, match="leave the with block of lora_disabled"):
            act(model)
    assert same(model, before)
    assert torch.equal(model(tokens), wanted)
    assert not (tmp_path / "adapter").exists()


def test_inputs_that_the_model_refuses_change_nothing(llama, tokens):
    inject_lora(llama, LoraConfig(r=4))
    before = copy.deepcopy(state_of(llama))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        merge_lora(llama, check_on={"nonsense": tokens})
    assert same(llama, before)
