"""Adapters at a lower rank, against a dense SVD in float64 and what PEFT computes with the files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    resize_adapter,
    save_adapter,
    unload_lora,
)
from lora_lightning.adapters import write_gguf
from lora_lightning.adapters.export import export_folder
from lora_lightning.injection.state import lora_layers

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


class Net(nn.Module):
    """A layer of every kind but experts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.transposed = Conv1D(12, 12)
        self.conv = nn.Conv2d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, tokens):
        h = self.transposed(self.embed(tokens)).transpose(1, 2).unflatten(2, (2, -1))
        h = self.grouped(self.conv(h)).flatten(2).transpose(1, 2)
        return self.head(self.attention(h, h, h)[0])


KINDS = ["embed", "transposed", "conv", "attention", "head"]
CASES = {
    "linear": (llama, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        llama,
        {
            "r": 8,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, "1.self_attn.o_proj": 6},
            "alpha_pattern": {"down_proj": 24},
        },
    ),
    "every kind": (Net, {"r": 8, "lora_alpha": 12, "target_modules": KINDS}),
    "experts": (
        mixtral,
        {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "both of the experts": (
        mixtral,
        {"r": 6, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"r": 8, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "pissa": (llama, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}


def tokens():
    return torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def outputs(model):
    with torch.no_grad():
        out = model.eval()(tokens())
    return getattr(out, "logits", out)


def trained(case, shake, folder, **more):
    """A base model, the folder of an adapter of it, and the updates by layer."""
    make, fields = CASES[case] if isinstance(case, str) else case
    torch.manual_seed(1)
    model = make().double()
    inject_lora(model, LoraConfig(**(fields | more)))
    shake(model, 0.3)
    save_adapter(model, folder)
    unload_lora(model)
    load_adapter(model, folder)
    deltas = updates(model)
    unload_lora(model)
    return model, deltas


def updates(model):
    return {name: layer.lora_weight_delta().detach().clone() for name, layer in lora_layers(model)}


def best(delta: torch.Tensor, r: int) -> torch.Tensor:
    """The best approximation of a rank, from the whole matrix (of each expert)."""
    matrix = delta if delta.ndim == 3 else delta.flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return ((u[..., :r] * s[..., None, :r]) @ v[..., :r, :]).reshape(delta.shape)


@pytest.mark.filterwarnings("ignore:.*PEFT")
@pytest.mark.parametrize("case", CASES)
def test_each_update_is_the_best_of_its_rank(case, shake, tmp_path):
    model, before = trained(case, shake, tmp_path / "wide")
    report = resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    load_adapter(model, tmp_path / "small")
    after = updates(model)
    assert after.keys() == before.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], best(delta, 2), rtol=1e-9, atol=1e-10, msg=name)
    assert {layer.lora_r for _, layer in lora_layers(model)} == {2}
    total = sum(float(delta.square().sum()) for delta in before.values())
    left = sum(float(delta.square().sum()) for delta in after.values())
    assert report.kept == pytest.approx(left / total)
    assert 0.05 < report.kept < 0.99


@pytest.mark.parametrize("case", ["linear", "rslora", "patterns", "experts"])
def test_peft_computes_the_same_with_it(case, shake, tmp_path):
    model, _ = trained(case, shake, tmp_path / "wide")
    resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    load_adapter(model, tmp_path / "small")
    ours = outputs(model)
    unload_lora(model)
    theirs = PeftModel.from_pretrained(model, tmp_path / "small", autocast_adapter_dtype=False)
    torch.testing.assert_close(outputs(theirs), ours, rtol=1e-8, atol=1e-9)


def test_groups_of_a_convolution_are_cut_each(shake, tmp_path):
    model = Net().double()
    inject_lora(model, LoraConfig(r=8, lora_alpha=12, target_modules=["grouped"]))
    shake(model, 0.3)
    wide = load_file(save_adapter(model, tmp_path / "wide") / "adapter_model.safetensors")
    report = resize_adapter(tmp_path / "wide", tmp_path / "small", r=5)
    assert [row.r for row in report.layers] == [4]  # five cannot be shared by two
    small = load_file(tmp_path / "small/adapter_model.safetensors")
    halves = []
    for tensors, r, scale in ((wide, 8, 1.5), (small, 4, 1.5)):
        a = tensors["base_model.model.grouped.lora_A.weight"].flatten(1)
        b = tensors["base_model.model.grouped.lora_B.weight"].flatten(1)
        halves.append([scale * b[6 * g : 6 * g + 6] @ a[r // 2 * g : r // 2 * (g + 1)] for g in range(2)])
    for before, after in zip(*halves, strict=True):
        torch.testing.assert_close(after, best(before, 2), rtol=1e-9, atol=1e-10)
    unload_lora(model)
    load_adapter(model, tmp_path / "small")


def test_the_scale_stays_and_the_factors_are_balanced(shake, tmp_path):
    model, _ = trained("rslora", shake, tmp_path / "wide")
    resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    load_adapter(model, tmp_path / "small")
    for _, layer in lora_layers(model):
        assert layer.lora_scaling == pytest.approx(16 / math.sqrt(8))
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-9, atol=1e-10)
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]


def test_patterns_stay_short_and_mean_the_same(shake, tmp_path):
    model, before = trained("patterns", shake, tmp_path / "wide")
    resize_adapter(tmp_path / "wide", tmp_path / "small", r=4)
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["rank_pattern"] == {"q_proj": 3}
    load_adapter(model, tmp_path / "small")
    for name, delta in updates(model).items():
        torch.testing.assert_close(delta, best(before[name], 4), rtol=1e-9, atol=1e-10)
    scales = {name.rpartition(".")[2]: layer.lora_scaling for name, layer in lora_layers(model)}
    assert scales == pytest.approx({"q_proj": 4 / 3, "o_proj": 4 / 6, "down_proj": 3})


def test_energy_gives_each_layer_the_rank_that_holds_it(shake, tmp_path):
    model, before = trained("patterns", shake, tmp_path / "wide")
    report = resize_adapter(tmp_path / "wide", tmp_path / "small", energy=0.9)
    load_adapter(model, tmp_path / "small")
    after = updates(model)
    ranks = {name: layer.lora_r for name, layer in lora_layers(model)}
    assert ranks == {row.layer: row.r for row in report.layers}
    assert len(set(ranks.values())) > 1
    for name, delta in before.items():
        torch.testing.assert_close(after[name], best(delta, ranks[name]), rtol=1e-9, atol=1e-10)
        share = [float(best(delta, r).square().sum() / delta.square().sum()) for r in (ranks[name] - 1, ranks[name])]
        assert share[0] < 0.9 <= share[1]
    resize_adapter(tmp_path / "wide", tmp_path / "capped", r=2, energy=0.9)
    assert json.loads((tmp_path / "capped/adapter_config.json").read_text())["r"] == 2


def test_what_is_no_update_is_taken_over(shake, tmp_path):
    fields = {
        "r": 4,
        "target_modules": ["q_proj"],
        "lora_bias": True,
        "bias": "all",
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3, 5],
    }
    trained((lambda: llama(attention_bias=True), fields), shake, tmp_path / "wide")
    (tmp_path / "wide/tokenizer_config.json").write_text("{}")
    (tmp_path / "wide/README.md").write_text("what it was")
    resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    wide, small = (load_file(tmp_path / f"{each}/adapter_model.safetensors") for each in ("wide", "small"))
    assert wide.keys() == small.keys()
    kept = [key for key in wide if not key.endswith(("lora_A.weight", "lora_B.weight"))]
    assert len(kept) > 8
    assert all(torch.equal(wide[key], small[key]) for key in kept)
    assert sorted(each.name for each in (tmp_path / "small").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lightning.json",
        "tokenizer_config.json",
    ]


def test_dora_keeps_its_magnitudes_and_says_what_that_means(shake, tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
    trained((llama, fields), shake, tmp_path / "wide")
    assert "nearest update, not the nearest weight" in str(resize_adapter(tmp_path / "wide", tmp_path / "small", r=2))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    wide, small = (load_file(tmp_path / f"{each}/adapter_model.safetensors")[key] for each in ("wide", "small"))
    assert torch.equal(wide, small)


def test_half_precision_is_cut_in_double(shake, tmp_path):
    model, _ = trained("linear", shake, tmp_path / "wide")
    file = tmp_path / "wide/adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    load_adapter(model, tmp_path / "wide")
    before = updates(model)
    unload_lora(model)
    resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    small = load_file(tmp_path / "small/adapter_model.safetensors")
    assert {value.dtype for value in small.values()} == {torch.bfloat16}
    load_adapter(model, tmp_path / "small")
    for name, delta in updates(model).items():
        expected = best(before[name], 2)
        assert (delta - expected).norm() < 0.01 * expected.norm()


def test_a_layer_that_never_moved_can_be_trained_on(tmp_path):
    model = llama().double()
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))  # B is zero
    save_adapter(model, tmp_path / "wide")
    report = resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    assert report.kept == 1
    small = load_file(tmp_path / "small/adapter_model.safetensors")
    assert all(bool(value.any()) == key.endswith("lora_A.weight") for key, value in small.items())


@pytest.mark.filterwarnings("ignore:.*PEFT")
def test_all_of_the_rank_loses_nothing(shake, tmp_path):
    model, before = trained("every kind", shake, tmp_path / "wide")
    report = resize_adapter(tmp_path / "wide", tmp_path / "same", r=8)
    assert report.kept == pytest.approx(1)
    load_adapter(model, tmp_path / "same")
    for name, delta in updates(model).items():
        torch.testing.assert_close(delta, before[name], rtol=1e-9, atol=1e-10)


def test_mistakes_are_told_and_nothing_is_written(shake, tmp_path):
    trained("linear", shake, tmp_path / "wide")
    with pytest.raises(LoraConfigError, match=r"was trained at r=8, .*choose r of at most 8.*\(got r=9\)"):
        resize_adapter(tmp_path / "wide", tmp_path / "small", r=9)
    with pytest.raises(LoraConfigError, match=r"name the new rank, r=8, or the share.*energy=0\.99"):
        resize_adapter(tmp_path / "wide", tmp_path / "small")
    with pytest.raises(LoraConfigError, match=r"(?s)r must be at least 1.*above 0 and up to 1, got 99"):
        resize_adapter(tmp_path / "wide", tmp_path / "small", r=0, energy=99)
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        resize_adapter(tmp_path, tmp_path / "small", r=2)
    assert not (tmp_path / "small").exists()
    (tmp_path / "small").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    assert not list((tmp_path / "small").iterdir())
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_an_adapter_for_weights_that_pissa_has_changed_is_converted_first(tmp_path):
    """PEFT saves it so unless it is told to convert."""
    base = llama()
    theirs = get_peft_model(
        copy.deepcopy(base), PeftConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    ).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_B" in name:
                value.add_(torch.randn_like(value))
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"has init_lora_weights='pissa': .* save_adapter\(model, another folder\)"):
        resize_adapter(tmp_path / "theirs", tmp_path / "small", r=2)
    with pytest.raises(AdapterError, match="has init_lora_weights='pissa'"):
        write_gguf(tmp_path / "theirs", tmp_path / "a.gguf", base.config.to_dict())
    with pytest.raises(AdapterError, match="has init_lora_weights='pissa'"):
        export_folder(tmp_path / "theirs", tmp_path / "served", fold_scaling=True)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "converted")
    resize_adapter(tmp_path / "converted", tmp_path / "small", r=8)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "small")
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_contradicts_its_config(shake, tmp_path):
    trained("linear", shake, tmp_path / "wide")
    config = tmp_path / "wide/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    with pytest.raises(AdapterError, match=r"lora_A\.weight is of rank 8, and its config gives .* r=5"):
        resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)


def test_the_report_names_the_layer_that_lost_most(shake, tmp_path):
    trained("linear", shake, tmp_path / "wide")
    report = resize_adapter(tmp_path / "wide", tmp_path / "small", r=2)
    worst = min(report.layers, key=lambda row: row.kept)
    assert f"4 updates from r=8 to r=2: {report.parameters:,} parameters" in str(report)
    assert worst.layer in str(report)
    assert report.parameters * 4 == report.parameters_before
    assert Path(report.folder) == tmp_path / "small"
