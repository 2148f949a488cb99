"""`save_adapter(..., fold_scaling=True)`: PEFT and a reader that knows one scale alone give the adapted outputs."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_lightning import AdapterError, LoraConfig, inject_lora, load_adapter, lora_state_dict, save_adapter
from lora_lightning.adapters import adapter_from_checkpoint
from lora_lightning.adapters.checkpoint import CHECKPOINT_KEY, FORMAT, checkpoint_entry

CASES = [
    ("llama", {}),
    ("llama", {"lora_alpha": 3}),
    ("llama", {"use_rslora": True, "r": 5}),
    ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 7}}),
    ("llama", {"alpha_pattern": {"v_proj": 11, "up_proj": 0.5}, "use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 3}, "lora_alpha": 5}),
    ("llama", {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.0\..*": 1}}),
    (
        "llama",
        {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ),  # written with rank 2r
    ("gpt2", {"rank_pattern": {"c_attn": 6, "mlp.c_proj": 1}, "alpha_pattern": {"c_fc": 2}}),
]


def saved(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save_adapter(model, folder, **options)


@pytest.fixture
def case(request, shake):
    name, fields = request.param
    model = request.getfixturevalue(name).double()
    base = copy.deepcopy(model)
    inject_lora(model, LoraConfig(**{"r": 4, "init_lora_weights": False, **fields}))
    shake(model)
    return base, model


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_every_reader_gives_the_same_outputs(case, tokens, tmp_path):
    base, model = case
    wanted = model(tokens).logits
    folder = saved(model, tmp_path / "folded", fold_scaling=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    ranks = {value.shape[0] for key, value in weights.items() if "_A" in key}
    ranks |= {value.shape[1] for key, value in weights.items() if "_B" in key}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = (
            peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).double().eval()
        )
    torch.testing.assert_close(theirs(tokens).logits, wanted, rtol=1e-10, atol=1e-10)
    load_adapter(base, folder)
    torch.testing.assert_close(base(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


def test_a_server_that_knows_one_scale_would_be_wrong_without_it(llama, tmp_path):
    """What vLLM adds to a weight, lora_alpha / r · B A with r and alpha from the top of the config, is s · B A."""
    model = llama.double()
    fields = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16, "k_proj": 1}, "init_lora_weights": False}
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **fields))
    folders = [saved(model, tmp_path / str(fold), fold_scaling=fold) for fold in (True, False)]
    right = []
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
        for name in "qkv":
            served = (
                config["lora_alpha"] / config["r"] * weights[key.format(name, "B")] @ weights[key.format(name, "A")]
            )
            layer = model.get_submodule(f"model.layers.0.self_attn.{name}_proj")
            right.append(torch.allclose(served, layer.lora_weight_delta(), rtol=1e-10))
    assert right == [True, True, True, False, False, True]


def test_half_precision_adapters_lose_nothing(llama, tokens, tmp_path):
    base = copy.deepcopy(llama)
    inject_lora(llama, LoraConfig(r=4, use_rslora=True, lora_alpha=3, init_lora_weights=False))
    for name, parameter in llama.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    folder = saved(llama, tmp_path / "folded", fold_scaling=True)
    load_adapter(base, folder)
    layer, twin = (model.model.layers[0].mlp.up_proj for model in (llama, base))
    exact = layer.lora_scaling * (layer.lora_B.float() @ layer.lora_A.float())
    torch.testing.assert_close(twin.lora_weight_delta(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "vLLM does not yet support DoRA."),
        ({"bias": "lora_only"}, "Adapter bias is not supported."),
        ({"lora_bias": True}, "Adapter bias is not supported."),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens: vLLM knows plain adapters of layers only"),
        ({"modules_to_save": ["lm_head"]}, "vLLM only supports modules_to_save being None."),
    ],
)
def test_what_such_a_server_refuses_is_refused_here(request, tmp_path, fields, message):
    model = request.getfixturevalue("gpt2" if {"bias", "lora_bias"} & fields.keys() else "llama")
    inject_lora(model, LoraConfig(r=2, **fields))
    with pytest.raises(AdapterError, match=message.replace(".", r"\.")):
        save_adapter(model, tmp_path / "folded", fold_scaling=True)
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("start", [False, "pissa"])
def test_a_checkpoint_gives_the_same_folder(llama, shake, tmp_path, start):
    fields = {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "init_lora_weights": start}
    inject_lora(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields))
    shake(llama)
    entry = {CHECKPOINT_KEY: {"format": FORMAT, "adapters": {"default": checkpoint_entry(llama, None)}}}
    torch.save({"state_dict": dict(lora_state_dict(llama))} | entry, tmp_path / "end.ckpt")
    made = adapter_from_checkpoint(tmp_path / "end.ckpt", fold_scaling=True)
    folder = save_adapter(llama, tmp_path / "saved", fold_scaling=True)
    for path in folder.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes()
