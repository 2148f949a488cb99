"""Several adapters: nothing that one has is lost silently, and what is swapped in is what its folder says."""

import copy
import json
import shutil
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import (
    AdapterError,
    Adapters,
    LoraConfig,
    inject_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.state import record_of, the_root

TOKENS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(3))
HEAD = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
ROWS = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}
BIAS = {"r": 2, "target_modules": ["0"], "bias": "all"}


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


def moved(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def folder_of(path, fields, seed=1, base=0):
    model = llama(base)
    inject_lora(model, LoraConfig(**fields))
    return save_adapter(moved(model, seed), path)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("fields", [HEAD, ROWS], ids=["head", "rows"])
@pytest.mark.parametrize("off", [unload_lora, merge_lora])
@pytest.mark.parametrize("frozen_since", [False, True])
def test_what_trained_in_full_is_not_lost_silently(fields, off, frozen_since, tmp_path):
    model = llama()
    adapters = Adapters(model)
    adapters.add("plain", LoraConfig(r=2))
    adapters.add("full", LoraConfig(**fields))
    moved(model)
    if frozen_since:
        adapters.set("full")
    off(model)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"'full' was there to train .* delete\('full'\)"):
            adapters.save(tmp_path / "all")
    with pytest.raises(AdapterError, match="delete"):
        adapters.set("full")
    adapters.delete("full")
    adapters.save(tmp_path / "all")
    assert adapters.names == ("plain",)


def test_a_model_that_had_its_adapter_before_is_noticed_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    inject_lora(model, LoraConfig(**BIAS))
    adapters = Adapters(model)
    moved(model)
    unload_lora(model)
    with pytest.raises(AdapterError, match="'default' was there to train"):
        adapters.set("default")


@pytest.mark.parametrize("fields", [HEAD, ROWS], ids=["head", "rows"])
def test_nothing_is_lost_where_it_was_taken_out_or_only_used(fields):
    model = llama()
    adapters = Adapters(model)
    adapters.add("full", LoraConfig(**fields))
    expected = logits(moved(model))
    adapters.disable()
    adapters.set("full")
    unload_lora(model)
    adapters.set("full")
    assert torch.equal(logits(model), expected)


def test_moved_statistics_are_not_lost_silently():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    adapters = Adapters(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(5, 3))
    unload_lora(model)
    with pytest.raises(AdapterError, match="running statistics"):
        adapters.set("a")


@pytest.mark.parametrize("names", [None, ["a"]], ids=["all", "one"])
@pytest.mark.parametrize("fields", [HEAD, ROWS], ids=["head", "rows"])
def test_saving_and_loading_leave_the_gradients_of_the_one_that_trains(fields, names, tmp_path):
    model = llama()
    adapters = Adapters(model)
    adapters.add("b", LoraConfig(r=1))
    adapters.add("a", LoraConfig(**fields))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    before = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    adapters.save(tmp_path, names)
    adapters.load("c", tmp_path / "a")
    now = lora_parameters(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(p.grad, before[name]) for name, p in now.items())


def test_adding_to_another_base_leaves_nothing_behind(tmp_path):
    model = llama()
    adapters = Adapters(model)
    adapters.load("q", folder_of(tmp_path / "q", {"r": 2}))
    adapters.set("q")
    merge_lora(model)
    with pytest.raises(AdapterError, match="the base is another one"):
        adapters.add("new", LoraConfig(r=2))
    assert adapters.names == ("q",)
    assert not lora_parameters(model)


def test_two_defaults_are_refused_with_both_names(tmp_path):
    folder_of(tmp_path / "x", {"r": 2})
    shutil.copytree(tmp_path / "x", tmp_path / "x" / "default")
    adapters = Adapters(llama())
    with pytest.raises(AdapterError, match=r"x and .*x/default would both be 'default'"):
        adapters.load_all(tmp_path / "x")
    assert adapters.names == ()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_not_swapped_in_as_they_are(start, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**fields, init_lora_weights=start))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = Adapters(model := llama())
    adapters.load("slot", folder_of(tmp_path / "plain", fields), room=4)
    adapters.set("slot")
    before = logits(model)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{start}': its values are for a base"):
        adapters.swap("slot", tmp_path / "theirs")
    assert torch.equal(logits(model), before)
    load_adapter(again := llama(), tmp_path / "theirs")
    adapters.swap("slot", save_adapter(again, tmp_path / "converted"))
    torch.testing.assert_close(logits(model), theirs(TOKENS).logits.detach(), atol=1e-5, rtol=1e-5)


def test_swapping_takes_over_what_the_folder_says_of_its_base(tmp_path):
    first, other = folder_of(tmp_path / "first", {"r": 2}), folder_of(tmp_path / "other", {"r": 2}, base=5)
    second = llama()
    load_adapter(second, first)
    merge_lora(second)
    inject_lora(second, LoraConfig(r=2))
    record_of(the_root(second)[1]).bases = (str(first),)
    second = save_adapter(moved(second), tmp_path / "second")
    adapters = Adapters(model := llama())
    adapters.load("slot", first)
    for active in (False, True):
        if active:
            adapters.set("slot")
        with pytest.warns(UserWarning, match="other: the base model is not the one"):
            adapters.swap("slot", other)
        with pytest.warns(UserWarning, match="folded in: load_adapter and merge_lora those first"):
            adapters.swap("slot", second)
        adapters.save(tmp_path / str(active))
        assert json.loads((tmp_path / str(active) / "slot/lora_lightning.json").read_text())["bases"] == [str(first)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapters.swap("slot", first)
    assert record_of(the_root(model)[1]).bases == ()
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not the one"):
            adapters.swap("slot", other)
    assert torch.equal(logits(model), before)


def test_swapping_heads_beside_another_adapter_warns_of_no_other_base(tmp_path):
    adapters = Adapters(llama())
    adapters.load("head", folder := folder_of(tmp_path / "a", HEAD))
    adapters.load("plain", folder_of(tmp_path / "b", {"r": 2}))
    for name in ("plain", "head"):
        adapters.set(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapters.swap("head", folder)


def test_swapping_is_refused_while_rows_are_computed(tmp_path):
    adapters = Adapters(llama())
    adapters.load("slot", folder := folder_of(tmp_path / "a", {"r": 2}))
    with adapters.rows(["slot", "__base__"]), pytest.raises(AdapterError, match="leave the with block of rows"):
        adapters.swap("slot", folder)
    adapters.swap("slot", folder)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


@pytest.mark.filterwarnings("ignore:.*out_proj twice")
@pytest.mark.parametrize("active", [False, True])
def test_what_peft_writes_and_never_uses_is_passed_over_as_in_loading(active, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["attn", "out_proj"], init_lora_weights=False)
    base = Attention().eval()
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "mha")
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "mha2")
    load_adapter(loaded := copy.deepcopy(base), tmp_path / "mha2")
    adapters = Adapters(base)
    adapters.load("m", tmp_path / "mha")
    if active:
        adapters.set("m")
    adapters.swap("m", tmp_path / "mha2")
    adapters.set("m")
    x = torch.randn(2, 3, 8)
    assert torch.equal(base(x), loaded(x))
