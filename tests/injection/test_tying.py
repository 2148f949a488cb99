"""Tied embeddings and heads: one adapter for both where that is asked for, and parted as in PEFT where it is not."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    load_base,
    lora_disabled,
    lora_parameters,
    merge_lora,
    meta_parameters,
    save_adapter,
    unload_lora,
)

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return LlamaForCausalLM(config).double().eval()


def _theirs(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()


def _injected(base, **fields):
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_lora(model, LoraConfig(r=3, **fields))
    return model


TARGETS = [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"], r".*embed_tokens|.*q_proj"]
FULL = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
CASES = [*({"target_modules": names} for names in TARGETS)]
CASES += [*({"target_modules": ["q_proj"], "modules_to_save": names} for names in FULL)]


@pytest.mark.parametrize(("fields", "ensured"), [*((c, True) for c in CASES), *((CASES[i], False) for i in (0, 2, 6))])
def test_files_travel_both_ways_with_equal_outputs(fields, ensured, tied, tokens, shake, tmp_path):
    model = _injected(tied, **fields, ensure_weight_tying=ensured)
    assert torch.equal(model(tokens).logits, tied(tokens).logits)
    shake(model)
    logits = model(tokens).logits
    folder = save_adapter(model, tmp_path / "ours")
    theirs = _theirs(tied, folder)
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = copy.deepcopy(tied)
        load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(tokens).logits, logits, **EXACT)
    unload_lora(loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens).logits, tied(tokens).logits)


@pytest.mark.parametrize("fields", [CASES[i] for i in (0, 1, 4, 6)])
def test_what_is_tied_has_one_gradient_and_merges(fields, tied, tokens, shake):
    model = _injected(tied, **fields, ensure_weight_tying=True)
    shake(model)
    named = lora_parameters(model)
    assert not any("lm_head" in name for name in named)
    assert len({id(p) for p in named.values()}) == len(named)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(named)
    model(tokens).logits.sin().sum().backward()
    merged = copy.deepcopy(model)
    merge_lora(merged)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.requires_grad_(True).zero_grad()
    merged(tokens).logits.sin().sum().backward()
    whole = merged.lm_head.weight.grad
    values = {name.rpartition(".")[2]: p for name, p in named.items() if "embed_tokens" in name}
    close = {"atol": 1e-4, "rtol": 1e-4}  # norms are computed in single precision
    if "weight" in values:
        torch.testing.assert_close(values["weight"].grad, whole, **close)
    else:  # W + s · (B A)ᵀ
        scale = model.model.embed_tokens.lora_scaling
        torch.testing.assert_close(values["lora_A"].grad, scale * values["lora_B"].T @ whole.T, **close)
        torch.testing.assert_close(values["lora_B"].grad, scale * whole.T @ values["lora_A"].T, **close)
    adapted = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, adapted)
    with lora_disabled(model):
        torch.testing.assert_close(model(tokens).logits, tied(tokens).logits, **EXACT)
    assert torch.equal(model(tokens).logits, adapted)
    torch.testing.assert_close(merged(tokens).logits, adapted, **EXACT)
    unload_lora(model)
    assert torch.equal(model(tokens).logits, tied(tokens).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in tied.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_without_it_they_part_and_people_are_told(tied, tokens, shake):
    for fields in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        model = copy.deepcopy(tied)
        with pytest.warns(UserWarning, match=r"embed_tokens and lm_head are tied.*ensure_weight_tying=True keeps"):
            inject_lora(model, LoraConfig(r=2, **fields))
        shake(model)
        adapted = model(tokens).logits
        if "modules_to_save" in fields:
            assert model.lm_head.weight is not model.model.embed_tokens.weight
            assert torch.equal(model.lm_head.weight, tied.lm_head.weight)
            merged = copy.deepcopy(model)
            merge_lora(merged)
            torch.testing.assert_close(merged(tokens).logits, adapted, **EXACT)
            assert merged.config.tie_word_embeddings is False
        with lora_disabled(model):
            assert torch.equal(model(tokens).logits, tied(tokens).logits)
        unload_lora(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings
        assert torch.equal(model(tokens).logits, tied(tokens).logits)
        assert all(p.requires_grad for p in model.parameters())


def test_what_has_no_effect_is_told(tied, llama):
    with pytest.warns(UserWarning, match="no layer is tied to the input embedding"):
        inject_lora(llama, LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="neither model.embed_tokens nor lm_head is in target_modules"):
        inject_lora(tied, LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))


def test_a_magnitude_cannot_be_tied(tied):
    with pytest.raises(LoraConfigError, match="does not go with use_dora"):
        inject_lora(tied, LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True))


@pytest.mark.parametrize("variant", [{"lora_bias": True}, {"alora_invocation_tokens": [5]}])
@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_what_no_embedding_can_be_is_refused_before_anything_changes(variant, named, tied):
    before = {name: (type(module), set(vars(module))) for name, module in tied.named_modules()}
    with pytest.raises(LoraConfigError, match="embed_tokens cannot be adapted: "):
        inject_lora(tied, LoraConfig(target_modules=[named, "q_proj"], ensure_weight_tying=True, **variant))
    assert {name: (type(module), set(vars(module))) for name, module in tied.named_modules()} == before
    assert all(parameter.requires_grad for parameter in tied.parameters())


def test_a_file_whose_tied_layers_differ_is_refused(tied, shake, tmp_path):
    model = _injected(tied, target_modules=["embed_tokens"], ensure_weight_tying=True)
    shake(model)
    folder = save_adapter(model, tmp_path / "a")
    values = load_file(folder / "adapter_model.safetensors")
    values["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = copy.deepcopy(tied)
    with pytest.raises(AdapterError, match=r"lm_head\.lora_A\.weight is not that of the embedding"):
        load_adapter(loaded, folder)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in tied.modules()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"], "trainable_token_indices": [3, 1, 63]},
    ],
)
def test_a_model_that_is_filled_after_injection(fields, tied, tokens, tmp_path):
    tied.save_pretrained(tmp_path)
    config = LoraConfig(r=2, init_lora_weights=False, **fields)
    expected = copy.deepcopy(tied)
    inject_lora(expected, config, seed=3)
    with meta_parameters():
        model = type(tied)(tied.config).eval()
    inject_lora(model, config, seed=3)
    load_base(model, tmp_path, dtype=torch.float64)
    model.double()
    close = {"atol": 1e-6, "rtol": 1e-5}  # frequencies of positions are made in single precision
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, **close)
    with lora_disabled(model):
        torch.testing.assert_close(model(tokens).logits, tied(tokens).logits, **close)
    unload_lora(model)
    torch.testing.assert_close(model(tokens).logits, tied(tokens).logits, **close)
    assert model.lm_head.weight is model.model.embed_tokens.weight
