"""The presets: complete, right for any architecture, and at home in anybody's Hydra app."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import lora_lightning
from hydra_plugins.lora_lightning import alpha_for_rank, learning_rate_for_scale
from lora_lightning import LoraConfig, inject_lora

PRESETS = Path(lora_lightning.__file__).parent / "presets" / "lora"
STARTS = ["corda", "eva", "lora_ga", "mica", "olora", "pissa"]
NAMES = sorted(["balanced", "conservative", "dora", "high_capacity", "qlora", *STARTS])
ROOT = Path(lora_lightning.__file__).parents[1]


def test_there_are_these_presets():
    assert sorted(path.stem for path in PRESETS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_holds_every_field(composed, name):
    preset = composed(f"lora={name}").lora
    assert list(preset) == [field.name for field in fields(LoraConfig)]
    LoraConfig.from_dict(preset)


@pytest.mark.parametrize(
    ("name", "r", "alpha", "scale", "dropout", "rslora"),
    [
        ("conservative", 4, 8, 2, 0.0, False),
        ("balanced", 16, 32, 2, 0.05, False),
        ("high_capacity", 64, 128, 16, 0.0, True),
        ("dora", 16, 32, 2, 0.05, False),
    ],
)
def test_the_presets_are_the_patterns_of_the_field(composed, name, r, alpha, scale, dropout, rslora):
    config = LoraConfig.from_dict(composed(f"lora={name}").lora)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (r, alpha, dropout, rslora)
    assert config.scaling() == scale
    assert config.use_dora == (name == "dora")


@pytest.mark.parametrize("name", STARTS)
def test_a_start_has_its_preset(composed, name):
    config = LoraConfig.from_dict(composed(f"lora={name}").lora)
    assert config.init_lora_weights == name
    assert config.lora_dropout == 0  # else outputs do not begin as they were


@pytest.mark.parametrize("name", NAMES)
def test_alpha_follows_r_unless_it_is_given(composed, name):
    assert composed(f"lora={name}", "lora.r=10").lora.lora_alpha == 20
    assert composed(f"lora={name}", "lora.r=10", "lora.lora_alpha=5").lora.lora_alpha == 5


@given(st.integers(1, 10_000))
def test_the_scale_of_plain_lora_is_2_for_every_rank(r):
    assert alpha_for_rank(r) / r == 2


@given(st.integers(1, 512), st.integers(1, 2048), st.booleans())
def test_a_step_is_never_larger_than_at_the_usual_scale(r, alpha, rslora):
    scale = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora).scaling()
    rate = learning_rate_for_scale(1e-3, r, alpha, rslora)
    assert rate <= 1e-3
    assert rate * scale <= 2e-3 * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_learning_rate_is_the_one_that_is_used(composed, name):
    stated = re.search(r"Stated learning rate for AdamW: ([\d.e-]+\d)", (PRESETS / f"{name}.yaml").read_text())
    assert composed(f"lora={name}").optimizer.lr == pytest.approx(float(stated[1]))
    assert composed(f"lora={name}", "optimizer.lr=0.5").optimizer.lr == 0.5


# One tiny model of each architecture, and the names of the layers that hold its query and value projections.
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"q_proj", "v_proj"}),
    "bert": (transformers.BertConfig, transformers.BertModel, {"query", "value"}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"c_attn"}),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"qkv_proj"}),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel, {"q_lin", "v_lin"}),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, {"q", "v"}),
    "falcon": (transformers.FalconConfig, transformers.FalconForCausalLM, {"query_key_value"}),
    "mpt": (transformers.MptConfig, transformers.MptForCausalLM, {"Wqkv"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_conservative_means_query_and_value_whatever_they_are_called(composed, name):
    config_class, model_class, expected = ARCHITECTURES[name]
    sizes = {"pad_token_id": 0} if name == "phi3" else {}
    with torch.device("meta"):
        model = model_class(config_class(**sizes))
    pattern = re.compile(composed("lora=conservative").lora.target_modules)
    found = {path.rpartition(".")[2] for path, _ in model.named_modules() if path and pattern.fullmatch(path)}
    assert found == expected


def test_conservative_adapts_each_layer_of_a_real_model(composed):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
    report = inject_lora(model, LoraConfig.from_dict(composed("lora=conservative").lora))
    assert len(report.rows) == 6


APP = """
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path=None)
def app(cfg):
    print(OmegaConf.to_yaml(cfg, resolve=True))

app()
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+lora=high_capacity"], ["lora:", "r: 64", "lora_alpha: 128", "use_rslora: true"]),
        (["+lora@net.peft=balanced", "net.peft.r=8"], ["peft:", "r: 8", "lora_alpha: 16"]),
    ],
)
def test_presets_in_somebody_elses_app(tmp_path, overrides, expected):
    (tmp_path / "app.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "app.py", *overrides, "hydra.run.dir=."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    for line in expected:
        assert line in done.stdout


def test_the_plugin_is_light():
    code = "import sys, hydra_plugins.lora_lightning; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
