"""Replicated layers: PEFT's stack, adapters of their own over shared weights, generation, and the way back."""

import contextlib
import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

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
    save_adapter,
    unload_lora,
)
from lora_lightning.injection import check_config

EXACT = {"atol": 1e-10, "rtol": 1e-10}
SPANS = [[0, 3], [1, 4]]


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).double().eval()


def _qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=kinds,
        sliding_window=3,
        use_sliding_window=True,
    )
    return Qwen3ForCausalLM(config).double().eval()


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).double().eval()


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32)).double().eval()


MODELS = {"llama": (_llama, ["q_proj", "up_proj"]), "qwen3": (_qwen3, ["q_proj"]), "bert": (_bert, ["query"])}


@pytest.mark.parametrize("name", MODELS)
def test_files_travel_both_ways_with_equal_outputs(name, tokens, shake, tmp_path):
    build, targets = MODELS[name]
    base = build()
    model = copy.deepcopy(base)
    fields = {"target_modules": targets, "layer_replication": SPANS, "rank_pattern": {r"layers?\.5\..*": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = inject_lora(model, LoraConfig(r=2, **fields))
    assert len(report.rows) == 6 * len(targets)
    shake(model)
    logits = model(tokens).logits
    folder = save_adapter(model, tmp_path / "ours")
    if name == "qwen3":  # PEFT leaves layer_types as they are, which is another model
        loaded = copy.deepcopy(base)
        load_adapter(loaded, folder)
        torch.testing.assert_close(loaded(tokens).logits, logits, **EXACT)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(tokens).logits, logits, **EXACT)


@pytest.mark.parametrize(("build", "target"), [(_qwen3, "q_proj"), (_gpt2, "c_attn")])
def test_a_cache_of_keys_and_values_changes_nothing(build, target, tokens, shake):
    model = build()
    inject_lora(model, LoraConfig(r=2, target_modules=[target], layer_replication=SPANS))
    shake(model)
    assert model.config.num_hidden_layers == 6
    numbers = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(6))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))


def test_copies_share_the_base_and_not_the_adapter(tokens):
    model = _llama()
    own = list(model.model.layers)
    size = sum(p.numel() for p in model.parameters())
    report = inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=SPANS))
    layers = model.model.layers
    assert [layers[i] is own[i] for i in range(3)] == [True] * 3
    assert layers[5] is own[3]
    assert layers[3].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight
    assert layers[3].self_attn.q_proj.lora_A is not layers[1].self_attn.q_proj.lora_A
    assert layers[3].self_attn.config is model.config
    assert report.total_parameters == size + report.trainable_parameters
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model).values())
    assert len(lora_parameters(model)) == 12


@pytest.mark.parametrize("spans", [SPANS, [[2, 4], [0, 2]], [[1, 3]]])
def test_the_way_back(spans, tokens, shake):
    model = _qwen3()
    own, state = list(model.model.layers), {n: v.clone() for n, v in model.state_dict().items()}
    logits, config = model(tokens).logits, model.config.to_dict()
    classes = [type(module) for module in model.modules()]
    lora = LoraConfig(r=2, layer_replication=spans)
    inject_lora(model, lora)
    stack = list(model.model.layers)
    inject_lora(model, lora)
    assert list(model.model.layers) == stack
    shake(model)
    adapted = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, adapted)
        unload_lora(twin)
        assert torch.equal(twin(tokens).logits, logits)
    with lora_disabled(model):
        assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(model(tokens).logits, adapted)
    unload_lora(model)
    assert list(model.model.layers) == own
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in own] == [0, 1, 2, 3]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("unload", [True, False])
def test_layers_left_out_go_where_the_model_goes(unload, tokens):
    def build():
        torch.manual_seed(3)
        model = _llama().train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.9
        return model

    model, plain = build(), build()
    inject_lora(model, LoraConfig(target_modules=["q_proj"], layer_replication=[[1, 3]]))
    for each in (model, plain):
        each.to(torch.bfloat16).eval()
    if unload:
        unload_lora(model)
    with contextlib.nullcontext() if unload else lora_disabled(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert {name: t.dtype for name, t in model.named_parameters() if "lora" not in name} == {
            name: t.dtype for name, t in plain.named_parameters()
        }


def test_merging_shared_weights_is_refused(tokens, shake):
    model = _llama()
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=SPANS))
    shake(model)
    adapted = model(tokens).logits
    for untie in (False, True):
        with pytest.raises(
            AdapterError, match=r"layer_replication has made .*layers\.1.* and .*layers\.3.* one weight"
        ):
            merge_lora(model, untie=untie)
        assert torch.equal(model(tokens).logits, adapted)


def test_layers_in_another_order_can_be_merged(tokens, shake):
    model = _llama()
    inject_lora(model, LoraConfig(r=2, layer_replication=[[2, 4], [0, 1]]))
    shake(model)
    adapted = model(tokens).logits
    merge_lora(model)
    torch.testing.assert_close(model(tokens).logits, adapted, **EXACT)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_replication": [[0, 5]]}, "names layer 4, and the model has 4 layers, 0 to 3"),
        ({"layer_replication": SPANS, "target_modules": ["layers.6.self_attn.q_proj"]}, "matches nothing"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(fields, message):
    model = _llama()
    own = list(model.model.layers)
    for attempt in (inject_lora, check_config):
        with pytest.raises(LoraConfigError, match=message):
            attempt(model, LoraConfig(r=2, **fields))
        assert list(model.model.layers) == own
        assert model.config.num_hidden_layers == 4
    with pytest.raises(LoraConfigError, match="no list of layers found in a Sequential"):
        inject_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig(layer_replication=SPANS))
    check_config(model, LoraConfig(layer_replication=SPANS, target_modules=["layers.5.self_attn.q_proj"]))
    assert list(model.model.layers) == own


def test_a_base_is_filled_before(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path)
    inject_lora(model, LoraConfig(r=2, layer_replication=SPANS))
    with pytest.raises(AdapterError, match="load_base comes before layer_replication"):
        load_base(model, tmp_path)
