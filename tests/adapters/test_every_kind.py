"""Adapters of every kind come and go beside others, and come back from files."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_lightning import AdapterError, Adapters, LoraConfig, lora_parameters

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **fields))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")
    )


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, groups=1, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        h = self.grouped(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.attention(h, h, h)[0]


KINDS = {
    "dora": (llama, {"use_dora": True}),
    "bias of B": (llama, {"lora_bias": True, "target_modules": ["q_proj"], "_bias": True}),
    "biases": (Images, {"bias": "all", "target_modules": ["conv"]}),
    "convolutions": (Images, {"target_modules": ["conv", "grouped"]}),
    "dora of convolutions": (Images, {"target_modules": ["conv"], "use_dora": True}),
    "attention": (Images, {"target_modules": ["attention"]}),
    "heads": (llama, {"modules_to_save": ["lm_head"]}),
    "pissa": (llama, {"init_lora_weights": "pissa"}),
    "olora": (llama, {"init_lora_weights": "olora", "use_rslora": True}),
    "mica": (llama, {"init_lora_weights": "mica"}),
    "loftq": (llama, {"init_lora_weights": "loftq", "target_modules": ["q_proj"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "replicated": (llama, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    "activated": (llama, {"target_modules": ["q_proj"], "alora_invocation_tokens": [7]}),
}

SUMMED = {"bias of B", "biases", "convolutions", "attention", "heads", "mica"}
BY_ROWS = {"dora", "mica", "bias of B", "convolutions", "dora of convolutions", "heads"}


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_comes_goes_and_comes_back(kind, shake, tmp_path):
    make, fields = KINDS[kind]
    torch.manual_seed(1)
    fields = dict(fields)
    model = (make() if not fields.pop("_bias", False) else llama(attention_bias=True)).double().eval()
    x = torch.randint(0, 32, (2, 6)) if make is not Images else torch.randn(2, 3, 5, 5, dtype=torch.float64)
    if kind == "activated":
        x[0, 2] = 7
    before, base = {name: value.clone() for name, value in model.state_dict().items()}, outputs(model, x)
    other = {"target_modules": ["conv"]} if make is Images else {"target_modules": ["v_proj"]}
    adapters = Adapters(model)
    adapters.add("plain", LoraConfig(r=2, **other), seed=1)
    shake(model, 0.3)
    plain = outputs(model, x)
    adapters.add("special", LoraConfig(r=2, **fields), seed=2)
    shake(model, 0.3)
    special, own = outputs(model, x), lora_parameters(model)
    assert not torch.allclose(special, base)
    for _ in range(2):
        adapters.set("plain")
        assert torch.equal(outputs(model, x), plain)
        adapters.set("special")
        torch.testing.assert_close(outputs(model, x), special, rtol=1e-12, atol=1e-12)
    adapters.train("special")
    assert lora_parameters(model).keys() == own.keys()
    adapters.disable()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapters.save(tmp_path / "all")
    again = Adapters(copy.deepcopy(model))
    again.load_all(tmp_path / "all")
    again.set("special")
    torch.testing.assert_close(outputs(again.model, x), special, rtol=1e-10, atol=1e-10)
    again.set("plain")
    torch.testing.assert_close(outputs(again.model, x), plain, rtol=1e-10, atol=1e-10)
    with nullcontext() if kind in SUMMED else pytest.raises(AdapterError, match="special cannot be combined"):
        adapters.set("plain", "special")
    with nullcontext() if kind in BY_ROWS else pytest.raises(AdapterError, match=r"special cannot be|reads weights"):
        by_rows(adapters, x)
    adapters.disable()
    assert torch.equal(outputs(model, x), base)


def by_rows(adapters, x):
    adapters.set("special")
    expected = [outputs(adapters.model, x)[0]]
    adapters.set("plain")
    expected.append(outputs(adapters.model, x)[1])
    with adapters.rows(["special", "plain"]):
        torch.testing.assert_close(outputs(adapters.model, x), torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_running_statistics_belong_to_the_adapter_with_which_they_moved(tmp_path):
    torch.manual_seed(2)
    model = Images().double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    base, adapters = outputs(model, x), Adapters(model)
    expected = {}
    for name in ("still", "moved", "more"):
        adapters.add(name, LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), seed=1)
        if name != "still":
            model.train()
            outputs(model, x + len(name))
            model.eval()
        expected[name] = outputs(model, x)
    assert not torch.allclose(expected["still"], expected["moved"])
    for name in ("still", "more", "moved"):
        adapters.set(name)
        assert torch.equal(outputs(model, x), expected[name])
    with adapters.rows(["still", "more"]):
        rows = torch.stack([expected["still"][0], expected["more"][1]])
        torch.testing.assert_close(outputs(model, x), rows, rtol=1e-10, atol=1e-10)
    adapters.set("still", "moved")
    assert not torch.equal(model.norm.running_mean, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(AdapterError, match=r"both have values of their own for norm\.num_batches_tracked"):
        adapters.set("more", "moved")
    adapters.disable()
    assert torch.equal(outputs(model, x), base)


@pytest.mark.filterwarnings("ignore")
def test_bases_in_four_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32), nn.Tanh()).to("cpu").eval()
    bits, x = model[0].weight.data.clone(), torch.randn(2, 5, 64)
    expected, adapters = {}, Adapters(model)
    for name, fields in {"one": {"r": 2}, "two": {"r": 3}, "dora": {"r": 2, "use_dora": True}}.items():
        adapters.add(name, LoraConfig(target_modules=["0"], init_lora_weights=False, **fields))
        expected[name] = outputs(model, x)
    for other in ("two", "dora"):
        with adapters.rows(["one", other]):
            rows = torch.stack([expected["one"][0], expected[other][1]])
            torch.testing.assert_close(outputs(model, x), rows, atol=1e-5, rtol=1e-5)
        adapters.set(other)
        assert torch.equal(outputs(model, x), expected[other])
    adapters.disable()
    assert torch.equal(model[0].weight.data, bits)  # its library would lay them out anew for inference
