"""Rows of tokens that train: PEFT's files and outputs, tied heads, new tokens, and the way back."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning import (
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)

EXACT = {"atol": 1e-10, "rtol": 1e-10}
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **changes)
    return LlamaForCausalLM(config).double().eval()


def _theirs(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()


CASES = [
    ({"tie_word_embeddings": True}, [5, 60, 2]),
    ({}, [5, 60, 2]),
    ({}, {"embed_tokens": [7], "lm_head": [3, 1]}),
    ({"tie_word_embeddings": True}, {"embed_tokens": [7, 3], "lm_head": [7, 3]}),
    ({"tie_word_embeddings": True}, {"embed_tokens": [7, 3], "lm_head": [4]}),
]


@pytest.mark.parametrize(("changes", "wanted"), CASES)
def test_files_travel_both_ways_with_equal_outputs(changes, wanted, tokens, shake, tmp_path):
    base = _llama(**changes)
    model = copy.deepcopy(base)
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=wanted))
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits, **EXACT)
    shake(model)
    tokens[0, :3] = torch.tensor([5, 60, 7])
    logits = model(tokens).logits
    theirs = _theirs(base, save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "ours/adapter_model.safetensors").keys() == (
        load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    )
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(loaded(tokens).logits, logits, **EXACT)
    assert lora_parameters(loaded).keys() == lora_parameters(model).keys()


def test_gradients_are_those_of_replaced_rows(tokens):
    model = _llama(tie_word_embeddings=True)
    wanted = [int(tokens[0, 0]), 63, int(tokens[1, 2])]
    full = copy.deepcopy(model)
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=wanted))
    for each in (model, full):
        each(tokens, labels=tokens).loss.backward()
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta
    torch.testing.assert_close(rows.grad, full.model.embed_tokens.weight.grad[wanted], **EXACT)
    assert model.model.embed_tokens.weight.grad is None


def test_new_tokens_are_saved_as_rows(tokens, shake, tmp_path):
    base = _llama(tie_word_embeddings=True)
    model = copy.deepcopy(base)
    model.resize_token_embeddings(67)
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[64, 65, 66]))
    shake(model)
    tokens[0, :2] = torch.tensor([64, 66])
    logits = model(tokens).logits
    folder = save_adapter(model, tmp_path / "a")
    saved = load_file(folder / "adapter_model.safetensors")
    assert [key for key in saved if "embed" in key or "head" in key] == [KEY]
    assert saved[KEY].shape == (3, 16)
    again = copy.deepcopy(base)
    again.resize_token_embeddings(67)
    with torch.no_grad():
        again.model.embed_tokens.weight[64:] = 9  # what a resized model has there does not matter
    load_adapter(again, folder)
    torch.testing.assert_close(again(tokens).logits, logits, **EXACT)
    small = copy.deepcopy(base)
    with pytest.raises(Exception, match="resize_token_embeddings"):
        load_adapter(small, folder)
    assert torch.equal(small(tokens.clamp(max=63)).logits, base(tokens.clamp(max=63)).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_way_back_and_the_state_in_between(tied, tokens, shake):
    model = _llama(tie_word_embeddings=tied)
    before, logits = {n: v.clone() for n, v in model.state_dict().items()}, model(tokens).logits
    classes = [type(module) for module in model.modules()]
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens[0, :4].unique().tolist())
    report = inject_lora(model, config)
    row = next(row for row in report.rows if row.kind == "tokens")
    assert row.parameters == 16 * len(config.trainable_token_indices)
    assert report.trainable_parameters == sum(row.parameters for row in report.rows)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    assert inject_lora(model, config).frozen_heads == ()
    shake(model)
    adapted = model(tokens).logits
    assert not torch.allclose(adapted, logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, adapted)
    with lora_disabled(model):
        assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(model(tokens).logits, adapted)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(merged(tokens).logits, adapted, **EXACT)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert [type(module) for module in merged.modules()] == classes
    unload_lora(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(tokens).logits, logits)


class Scaled(nn.Embedding):
    """Makes more of its rows than to look them up."""

    def forward(self, input):
        return super().forward(input) * 3.0


@pytest.mark.parametrize(
    "embedding",
    [
        nn.Embedding(9, 4),
        Scaled(9, 4),
        nn.Embedding(9, 4, max_norm=1.0),
        nn.Embedding(9, 4, padding_idx=2),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
    ],
)
def test_every_embedding_is_as_with_rows_written_into_its_weight(embedding):
    model = nn.ModuleDict({"emb": embedding.double()})
    x = torch.tensor([[0, 2, 2], [8, 5, 1]])
    inject_lora(model, LoraConfig(target_modules=[], trainable_token_indices={"emb": [2, 8]}))
    rows = model["emb"].token_adapter.trainable_tokens_delta
    with torch.no_grad():
        rows.copy_(torch.randn(2, 4))
    model["emb"](x).square().sum().backward()
    got = rows.grad.clone()
    out = model["emb"](x).detach()
    plain = copy.deepcopy(model)
    merge_lora(plain)
    plain["emb"].weight.requires_grad_(True)
    expected = plain["emb"](x)
    torch.testing.assert_close(out, expected, **EXACT)
    expected.square().sum().backward()
    torch.testing.assert_close(got, plain["emb"].weight.grad[[2, 8]], **EXACT)


def test_a_half_precision_base(tokens, shake):
    model = _llama(tie_word_embeddings=True).bfloat16()
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    shake(model)
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta
    assert rows.dtype == torch.float32
    assert model(tokens).logits.dtype == torch.bfloat16
    merge_lora(model)
    assert torch.equal(model.lm_head.weight[[1, 2]], rows.bfloat16())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [64]}, "has 64 rows, and 64 is asked for; for new tokens call.*resize_token"),
        ({"trainable_token_indices": {"embed_tokns": [1]}}, "'embed_tokns' matches nothing.*did you mean embed_tokens"),
        ({"target_modules": ["embed_tokens"]}, "adapted \\(target_modules\\) or trained in full"),
        ({"modules_to_save": ["embed_tokens"]}, "adapted \\(target_modules\\) or trained in full"),
        ({"trainable_token_indices": {"q_proj": [1], "norm": [2]}}, "norm cannot train: it is a LlamaRMSNorm"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(fields, message):
    model = _llama()
    classes, before = [type(m) for m in model.modules()], set(model.state_dict())
    with pytest.raises(LoraConfigError, match=message):
        inject_lora(model, LoraConfig(r=2, **{"target_modules": ["v_proj"], "trainable_token_indices": [1], **fields}))
    assert [type(m) for m in model.modules()] == classes
    assert set(model.state_dict()) == before


def test_peft_refuses_an_adapted_embedding_too():
    config = peft.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1])
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        peft.get_peft_model(_llama(), config)


def test_in_one_compiled_graph():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9)}).double()
    model["head"].weight = model["emb"].weight
    inject_lora(model, LoraConfig(target_modules=[], trainable_token_indices={"emb": [7, 2]}))
    rows = model["emb"].token_adapter.trainable_tokens_delta
    with torch.no_grad():
        rows.normal_()

    def both(x):
        return model["head"](model["emb"](x))

    x = torch.tensor([[0, 2, 7]])
    got, expected = torch.compile(both, backend="aot_eager", fullgraph=True)(x), both(x)
    torch.testing.assert_close(got, expected, **EXACT)
    (gradient,), (right,) = (torch.autograd.grad(out.square().sum(), [rows]) for out in (got, expected))
    torch.testing.assert_close(gradient, right, **EXACT)
