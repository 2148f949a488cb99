"""Which layers a config names: PEFT's answer where PEFT is right, ours with a message where it is silent."""

import re
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoraConfig, LoraConfigError, inject_lora
from lora_lightning.injection.matching import matches, pattern_value
from lora_lightning.injection.names import canonical, find_root
from lora_lightning.injection.state import lora_layers
from lora_lightning.injection.targets import resolve


def _meta(family):
    import transformers as tf

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    families = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**small, intermediate_size=48)),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8)
        ),
    }
    with torch.device("meta"):
        return families[family]()


CASES = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[02]\..*_proj"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "mlp.up_proj"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.layers.0.mlp"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "wte"]}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": [2], "layers_pattern": ["h"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": r".*attention.*(query|key)"}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": ["EncDecAttention.q"], "layers_to_transform": [1], "layers_pattern": "block"}),
]


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_the_same_layers_as_peft(family, fields):
    ours = _meta(family)
    inject_lora(ours, LoraConfig(r=2, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(_meta(family), peft.LoraConfig(r=2, **fields))
    found = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name for name, _ in lora_layers(ours)} == found
    assert found


@given(
    st.lists(st.sampled_from(["a", "b", "q_proj", "x.q_proj", "layers", "0", "my_q_proj"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b", "q_proj", "my_q_proj", "layers", "0"]), min_size=1, max_size=5),
)
def test_list_matching_is_by_whole_parts(entries, parts):
    name = ".".join(parts)
    expected = any(parts[-len(entry.split(".")) :] == entry.split(".") for entry in entries)
    assert matches(entries, name) is expected


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["q_proj", "layers.0.q_proj", r"layers\.\d+\..*", "v_proj"]), st.integers(1, 9)))
def test_patterns_take_pefts_value(patterns):
    for name in ("model.layers.0.q_proj", "model.layers.1.v_proj", "q_proj", "other"):
        key = peft.utils.other.get_pattern_key(patterns.keys(), name)
        assert pattern_value(patterns, name, 99) == patterns.get(key, 99)


def test_patterns_decide_rank_and_scale(llama):
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 4})
    inject_lora(llama, config)
    layers = dict(lora_layers(llama))
    assert layers["model.layers.0.self_attn.q_proj"].lora_A.shape == (2, 32)
    assert layers["model.layers.0.self_attn.q_proj"].lora_scaling == 16 / 2
    assert layers["model.layers.1.self_attn.q_proj"].lora_scaling == 4 / 2
    assert layers["model.layers.1.mlp.up_proj"].lora_scaling == 4 / 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches nothing \(did you mean q_proj"),
        ({"target_modules": ["q_proj", "k_porj"]}, "'k_porj' matches nothing"),
        ({"target_modules": r".*query"}, r"can be adapted: q_proj \(×2\)"),
        ({"target_modules": ["mlp"]}, "matches only .*LlamaMLP"),
        ({"target_modules": ["norm"]}, "LlamaRMSNorm"),
        ({"modules_to_save": ["head"]}, "'head' matches nothing.*lm_head"),
        ({"exclude_modules": r".*"}, "leaves no layer"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, "no target in layer 7; layers 0 to 1"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_and_changes_nothing(llama, fields, message):
    with pytest.raises(LoraConfigError, match=message):
        inject_lora(llama, LoraConfig(**fields))
    assert not list(lora_layers(llama))
    assert all(p.requires_grad for p in llama.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"nothing": 4}}, r"rank_pattern\['nothing'\]"),
        ({"alpha_pattern": {"nothing": 4}}, r"alpha_pattern\['nothing'\]"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules 'nothing'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 33}, r"rank larger.*32 to 32, r=33"),
    ],
)
def test_what_has_no_effect_is_warned_of(llama, fields, message):
    with pytest.warns(UserWarning, match=message):
        inject_lora(llama, LoraConfig(**fields))


def test_linear_layers_inside_multihead_attention_are_skipped_with_a_warning():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"not adapted: self_attn\.out_proj inside nn\.MultiheadAttention"):
        plan = resolve(model, LoraConfig())
    assert [target.name for target in plan.targets] == ["linear1", "linear2"]


def test_a_hazard_is_an_error_with_the_layers_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(LoraConfigError, match="1 cannot be adapted: it is lazy"):
        inject_lora(model, LoraConfig())


def test_a_layer_used_twice_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert len(inject_lora(model, LoraConfig(r=2)).rows) == 1


def test_canonical_names_and_root(llama):
    assert canonical("a._orig_mod.b._checkpoint_wrapped_module.weight") == "a.b.weight"
    around = nn.ModuleDict({"inner": torch.compile(llama), "head": nn.Linear(2, 2)})
    assert find_root(around)[0] == "inner"
    assert find_root(around)[1] is llama
    two = nn.ModuleDict({"a": llama, "b": _meta("llama")})
    assert find_root(two) == ("", two)
    assert re.fullmatch("inner", find_root(around)[0])
