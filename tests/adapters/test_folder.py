"""Adapter folders: PEFT and transformers read ours, we read theirs, and nothing that does not fit gets in."""

import copy
import json
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraConfig,
    inject_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    meta_parameters,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.state import injected_roots

CASES = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"q_proj": 3.5}}),
    ("llama", {"target_modules": r".*\.(q|v)_proj", "use_rslora": True}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {"exclude_modules": ["o_proj"]}),
    ("gpt2", {"bias": "all"}),
    ("gpt2", {"bias": "lora_only", "lora_alpha": 5}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
]


@pytest.fixture
def saved(llama, shake, tmp_path):
    """A base, an adapted model over it, and the folder of its adapter."""
    base = copy.deepcopy(llama)
    inject_lora(llama, LoraConfig(r=4, lora_alpha=8))
    shake(llama)
    return base, llama, save_adapter(llama, tmp_path / "adapter")


@pytest.mark.parametrize(("model_name", "fields"), CASES)
def test_every_reader_gives_the_same_logits(model_name, fields, request, tokens, shake, tmp_path):
    model = request.getfixturevalue(model_name)
    bases = [copy.deepcopy(model) for _ in range(4)]
    inject_lora(model, LoraConfig(r=4, **fields))
    shake(model)
    logits = model(tokens).logits
    folder = save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(bases[0], folder).eval()
        bases[1].load_adapter(str(folder))
    torch.testing.assert_close(theirs(tokens).logits, logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bases[1](tokens).logits, logits, atol=1e-6, rtol=1e-5)
    load_adapter(bases[2], folder)
    assert torch.equal(bases[2](tokens).logits, logits)
    assert not any(p.requires_grad for p in bases[2].parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(bases[3], tmp_path / "theirs", trainable=True)
    assert torch.equal(bases[3](tokens).logits, logits)
    assert set(lora_parameters(bases[3])) == set(lora_parameters(model))


@pytest.mark.parametrize(("model_name", "fields"), CASES)
def test_the_config_file_means_the_same_when_read_again(model_name, fields, request, tmp_path):
    model = request.getfixturevalue(model_name)
    inject_lora(model, LoraConfig(r=4, **fields))
    first = save_adapter(model, tmp_path / "one")
    again = request.getfixturevalue(model_name)
    unload_lora(again)
    load_adapter(again, first)
    second = save_adapter(again, tmp_path / "two")
    assert (first / "adapter_config.json").read_bytes() == (second / "adapter_config.json").read_bytes()
    assert (
        load_file(first / "adapter_model.safetensors").keys() == load_file(second / "adapter_model.safetensors").keys()
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.floats(0.5, 32), st.booleans(), st.sampled_from(["all-linear", "embedding"]))
def test_merging_equals_the_adapted_model_in_float64(r, alpha, rslora, targets):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randint(0, 11, (5,))
    wanted = "all-linear" if targets == "all-linear" else ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_lora(
            model,
            LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=wanted, init_lora_weights=False),
        )
    adapted = model(x)
    merge_lora(model)
    assert [type(part) for part in model] == [nn.Embedding, nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


def test_merging_is_all_or_nothing_and_refuses_ties(llama, tokens):
    inject_lora(llama, LoraConfig(r=4, init_lora_weights=False))
    logits = llama(tokens).logits
    bad = llama.model.layers[1].mlp.down_proj
    kept = bad.lora_B.detach().clone()
    weights = {name: p.clone() for name, p in llama.named_parameters()}
    with torch.no_grad():
        bad.lora_B[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"not be finite in model\.layers\.1\.mlp\.down_proj"):
        merge_lora(llama)
    with torch.no_grad():
        bad.lora_B.copy_(kept)
    assert all(torch.equal(p, weights[name]) for name, p in llama.named_parameters())
    assert torch.equal(llama(tokens).logits, logits)
    unload_lora(llama)
    llama.lm_head.weight = llama.model.embed_tokens.weight
    inject_lora(llama, LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head is tied to model\.embed_tokens"):
        merge_lora(llama)


def test_a_bfloat16_base_is_rounded_once(llama):
    llama.bfloat16()
    inject_lora(llama, LoraConfig(r=4, init_lora_weights=False))
    layer = llama.model.layers[0].mlp.up_proj
    exact = layer.weight.float() + layer.lora_weight_delta()
    merge_lora(llama)
    assert torch.equal(llama.model.layers[0].mlp.up_proj.weight, exact.bfloat16())


def test_an_adapter_is_not_written_over(saved, tmp_path):
    _, model, folder = saved
    with pytest.raises(AdapterError, match="holds an adapter already"):
        save_adapter(model, folder)
    save_adapter(model, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lightning.json",
    ]


def test_values_that_are_not_finite_are_not_saved(saved, tmp_path):
    _, model, _ = saved
    with torch.no_grad():
        next(iter(lora_parameters(model).values()))[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
DAMAGE = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "a pickle, which is not read here",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-50]),
        "damaged or was cut off",
    ),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "damaged or was cut off"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no object": (
        lambda f: (f / "adapter_config.json").write_text('["r", 8]'),
        r"is not a JSON object, it begins with \"\['r', 8\]\"",
    ),
    "no targets": (
        lambda f: _edit_config(f, target_modules=None),
        r"does not say which layers are adapted: target_modules is missing or null",
    ),
    "another kind": (lambda f: _edit_config(f, peft_type="IA3"), "type IA3"),
    "in force": (
        lambda f: _edit_config(f, use_qalora=True, velora_config={"a": 1}),
        r"use_qalora: True\n  - velora_config: \{",
    ),
    "wrong value": (lambda f: _edit_config(f, r=0), "r must be at least 1"),
    "other layers": (lambda f: _edit_config(f, target_modules=["q_proj"]), "not expected: base_model.model"),
    "unknown layers": (lambda f: _edit_config(f, target_modules=["query"]), "'query' matches nothing"),
    "missing key": (lambda f: _edit_weights(f, lambda t: t.pop(KEY)), r"missing: model\.layers\.0\.mlp\.up_proj"),
    "extra key": (lambda f: _edit_weights(f, lambda t: t.update(x=torch.zeros(1))), "not expected: x"),
    "other shape": (
        lambda f: _edit_weights(f, lambda t: t.update({KEY: torch.zeros(4, 33)})),
        r"is \(4, 33\), the model's is \(4, 32\)",
    ),
    "NaN": (lambda f: _edit_weights(f, lambda t: t[KEY].fill_(float("nan"))), "not finite .* in .*up_proj"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_stays(saved, tokens, damage):
    base, _, folder = saved
    do, message = DAMAGE[damage]
    do(folder)
    logits = base(tokens).logits
    with pytest.raises(Exception, match=message) as caught:
        load_adapter(base, folder)
    assert isinstance(caught.value, (AdapterError, ValueError))
    assert not injected_roots(base)
    assert torch.equal(base(tokens).logits, logits)
    assert all(p.requires_grad for p in base.parameters())


def test_settings_that_do_nothing_are_passed_over(saved, tokens, caplog):
    base, model, folder = saved
    _edit_config(folder, use_qalora=False, eva_config=None, megatron_core="megatron.core", loftq_config={})
    with caplog.at_level("INFO"):
        load_adapter(base, folder)
    assert "passed over, not in force: megatron_core, use_qalora" in caplog.text
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def test_another_base_is_warned_of(saved):
    base, _, folder = saved
    with torch.no_grad():
        base.model.norm.weight.add_(1)
    with pytest.warns(UserWarning, match="not the one this adapter was trained on"):
        load_adapter(base, folder)


def test_the_same_base_is_not_warned_of(saved):
    base, _, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(base, folder)


def test_loading_into_an_injected_model_checks_scale_and_fit(saved, tokens):
    base, model, folder = saved
    other = copy.deepcopy(base)
    inject_lora(base, LoraConfig(r=4, lora_alpha=8))
    load_adapter(base, folder, trainable=True)
    assert torch.equal(base(tokens).logits, model(tokens).logits)
    inject_lora(other, LoraConfig(r=4, lora_alpha=16))
    with pytest.raises(AdapterError, match="scale 4 in the model; the folder means r=4, scale 2"):
        load_adapter(other, folder)
    assert injected_roots(other)


@pytest.mark.parametrize("injected", [False, True])
def test_values_are_not_given_to_a_model_without_memory(saved, injected):
    base, _, folder = saved
    with meta_parameters():
        empty = type(base)(base.config)
    if injected:
        inject_lora(empty, LoraConfig(r=4, lora_alpha=8))
    with pytest.raises(AdapterError, match=r"no memory yet.*down_proj\.lora_A.* and 24 more.*load_base"):
        load_adapter(empty, folder)
    assert bool(injected_roots(empty)) is injected


def test_keys_without_pefts_prefix_are_read_with_a_warning(saved, tokens):
    base, model, folder = saved
    path = folder / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    with pytest.warns(UserWarning, match="lack PEFT's prefix"):
        load_adapter(base, folder)
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def test_a_folder_saved_from_around_or_inside_the_model_is_told_as_such(saved, tmp_path):
    base, _, folder = saved
    with pytest.raises(AdapterError, match=r"'model\.' before .*saved from a model that holds this one as 'model'"):
        load_adapter(base.model, folder)
    assert not injected_roots(base.model)
    inside = save_adapter(_readapted(base.model), tmp_path / "inside")
    unload_lora(base.model)
    with pytest.raises(AdapterError, match=r"this model's names have 'model\.' before .*load_adapter\(model\.model, "):
        load_adapter(base, inside)


def _readapted(model):
    inject_lora(model, LoraConfig(r=4, lora_alpha=8))
    return model


def test_names_that_differ_by_more_than_a_beginning_get_no_such_hint(saved):
    base, _, folder = saved
    _edit_weights(folder, lambda tensors: [tensors.update({f"{key}x": tensors.pop(key)}) for key in list(tensors)])
    with pytest.raises(AdapterError, match="missing: ") as caught:
        load_adapter(base, folder)
    assert "before" not in str(caught.value)


def test_what_trains_around_the_transformers_model_has_a_file_of_its_own(llama, shake, tmp_path):
    around = nn.ModuleDict({"model": llama, "value_head": nn.Linear(32, 1)})
    fresh = copy.deepcopy(around)
    inject_lora(around, LoraConfig(r=2, modules_to_save=["value_head"]))
    shake(around)
    folder = save_adapter(around, tmp_path / "a")
    assert load_file(folder / "modules_outside.safetensors").keys() == {"value_head.weight", "value_head.bias"}
    assert all(
        key.startswith("base_model.model.model.layers") for key in load_file(folder / "adapter_model.safetensors")
    )
    alone = copy.deepcopy(fresh["model"])
    load_adapter(fresh, folder)
    assert torch.equal(fresh["value_head"].weight, around["value_head"].weight)
    with pytest.warns(UserWarning, match="lie outside this model"):
        load_adapter(alone, folder)
