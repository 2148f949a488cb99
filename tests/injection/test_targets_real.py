"""Which layers of real transformers classes are adapted, with what rank and alpha: PEFT's, where PEFT is right."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers as tf

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, unload_lora
from lora_lightning.injection.state import lora_layers

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, head_dim=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
    "bert_tokens": lambda: tf.BertForTokenClassification(tf.BertConfig(**ENCODER)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16)
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
        )
    ),
}

CASES = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.o_proj", "model.layers.2.mlp.up_proj"]}),
    ("llama", {"target_modules": r"model\.layers\.(0|2)\.self_attn\.[qk]_proj"}),
    ("llama", {"target_modules": r".*layers\.(?!0\.).*(gate|up)_proj"}),
    ("llama", {"target_modules": ["q_proj", "k_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("qwen3", {"target_modules": "all-linear"}),
    ("qwen3", {"target_modules": r".*\.self_attn\.\w+_proj"}),
    ("qwen3", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 5}}),
    ("qwen3", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 3}}),
    ("qwen3", {"target_modules": ["o_proj"], "exclude_modules": ["layers.1.self_attn.o_proj"]}),
    ("mistral", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {r".*\.mlp\..*": 4}}),
    ("mistral", {"target_modules": ["mlp.gate_proj", "mlp.down_proj"]}),
    ("mistral", {"target_modules": ["k_proj"], "alpha_pattern": {r"^model\.layers\.2\..*": 9}}),
    ("mistral", {"target_modules": r"(.*\.)?v_proj", "modules_to_save": ["lm_head"]}),
    ("mistral", {"target_modules": ["up_proj", "q_proj"], "modules_to_save": ["model.layers.1.mlp"]}),
    ("gemma3", {"target_modules": "all-linear"}),
    ("gemma3", {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"embed_tokens": 3}}),
    ("gemma3", {"target_modules": r".*(up|down)_proj", "exclude_modules": r".*layers\.2\..*"}),
    ("gemma3", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]}),
    ("mixtral", {"target_modules": r".*\.self_attn\.\w_proj"}),
    ("mixtral", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers_to_transform": [0]}),
    ("mixtral", {"target_modules": r".*self_attn\.(q|o)_proj", "alpha_pattern": {"o_proj": 2}}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn"], "rank_pattern": {r"h\.0\.attn\.c_attn": 5}}),
    ("gpt2", {"target_modules": ["attn.c_proj", "wte", "wpe"]}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": [0, 1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": r"transformer\.h\.\d\.mlp\.c_(fc|proj)"}),
    ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "rank_pattern": {"query": 3}}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": ["attention.output.dense", "word_embeddings"]}),
    ("bert", {"target_modules": r".*encoder\.layer\.[12]\.attention\.self\.(query|key)"}),
    ("bert", {"target_modules": ["key"], "layers_to_transform": [2], "layers_pattern": "layer"}),
    ("bert_tokens", {"target_modules": "all-linear", "task_type": "TOKEN_CLS", "exclude_modules": ["classifier"]}),
    ("bert_tokens", {"target_modules": ["query"], "task_type": "TOKEN_CLS", "exclude_modules": [r"layer.0"]}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": ["EncDecAttention.q", "wo"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": r"decoder\..*\.(k|o)", "alpha_pattern": {r"block\.0\..*": 3}}),
    ("t5", {"target_modules": ["SelfAttention.q", "shared"], "exclude_modules": r"encoder\..*"}),
    ("t5", {"target_modules": ["relative_attention_bias", "wi"], "task_type": "SEQ_2_SEQ_LM"}),
    ("vit", {"target_modules": "all-linear"}),
    ("vit", {"target_modules": r".*\.(q|v)_proj|.*\.(query|value)", "modules_to_save": ["classifier"]}),
    ("vit", {"target_modules": r".*\.1\..*(fc1|dense)", "rank_pattern": {r".*": 6}}),
    ("whisper", {"target_modules": "all-linear"}),
    ("whisper", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    ("whisper", {"target_modules": ["encoder_attn.q_proj", "fc1"], "layers_to_transform": [1]}),
    ("whisper", {"target_modules": r"model\.decoder\..*\.(fc1|fc2|out_proj)", "rank_pattern": {"fc2": 3}}),
    ("whisper", {"target_modules": ["out_proj"], "exclude_modules": r".*encoder\..*"}),
    ("whisper", {"target_modules": ["decoder.embed_tokens", "self_attn.k_proj"], "alpha_pattern": {"k_proj": 1}}),
]
# What PEFT passes over without a word: an entry that matches nothing, beside others that do.
SILENT = [
    ("llama", {"target_modules": ["q_proj", "v_porj"]}, r"'v_porj' matches nothing \(did you mean"),
    ("gpt2", {"target_modules": ["c_attn", "q_proj"]}, "'q_proj' matches nothing"),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "'head' matches nothing"),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["poler"]}, "'poler' matches nothing"),
    ("mistral", {"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "no target in layer 9"),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [2, 3], "layers_pattern": "block"}, "no target in layer 3"),
]


@pytest.fixture(scope="module")
def models():
    """Models without memory by family, made once: one for us and one for PEFT."""
    made = {}

    def of(family):
        if family not in made:
            with torch.device("meta"):
                made[family] = FAMILIES[family](), FAMILIES[family]()
        return made[family]

    return of


def ours_of(model, fields):
    """Name to rank, alpha and scale of every adapted layer; the model is plain again afterwards."""
    inject_lora(model, LoraConfig(**{"r": 2, "lora_alpha": 6, **fields}))
    found = {name: (layer.lora_r, layer.lora_alpha, layer.lora_scaling) for name, layer in lora_layers(model)}
    unload_lora(model)
    return found


def theirs_of(model, fields):
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    found = {
        name.removeprefix("base_model.model."): tuple(
            getattr(module, what)["default"] for what in ("r", "lora_alpha", "scaling")
        )
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    adapted.unload()
    return found


def test_all_linear_means_linear_layers_in_a_mixture_too(models):
    """PEFT adapts experts and router as well, since they were linear layers before transformers 5; we ask for names."""
    ours, theirs = models("mixtral")
    found, more = (of(model, {"target_modules": "all-linear"}) for of, model in ((ours_of, ours), (theirs_of, theirs)))
    assert found == {name: value for name, value in more.items() if ".mlp." not in name}
    assert {name.rpartition("mlp.")[2] for name in more.keys() - found.keys()} >= {"experts", "gate"}


def test_a_head_that_the_task_trains_in_full_is_no_target(models):
    """PEFT would adapt it too, and fails."""
    ours, _ = models("bert_tokens")
    assert "classifier" not in ours_of(ours, {"target_modules": "all-linear", "task_type": "TOKEN_CLS"})


def test_there_are_enough_cases():
    assert len(CASES) >= 46
    assert {family for family, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_names_ranks_and_alphas_are_pefts(models, family, fields):
    ours, theirs = models(family)
    found = ours_of(ours, fields)
    assert found == theirs_of(theirs, fields)
    assert found


@pytest.mark.parametrize(("family", "fields", "message"), SILENT)
def test_what_peft_is_silent_about_is_an_error_here(models, family, fields, message):
    ours, theirs = models(family)
    assert theirs_of(theirs, fields)
    with pytest.raises(LoraConfigError, match=message):
        ours_of(ours, fields)
    assert not list(lora_layers(ours))
