"""One walk of a model, against torch's own; names that a config has, against the expressions that they stand for."""

import hashlib
import math
import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoraConfig, inject_lora, lora_parameters
from lora_lightning.injection import names
from lora_lightning.injection.matching import entries_for, pattern_value
from lora_lightning.injection.names import canonical, canonical_modules, parameters_of, walked_once

LOCAL = st.sampled_from(["a", "b", "0", "_orig_mod", "_fsdp_wrapped_module", "q_proj"])


@st.composite
def trees(draw):
    """Modules below modules, some of them in several places, some behind wrappers."""
    pool = [nn.Module() for _ in range(draw(st.integers(1, 8)))]
    for position, module in enumerate(pool):
        for local in draw(st.lists(LOCAL, max_size=3, unique=True)):
            later = pool[position + 1 :]
            module.add_module(local, draw(st.sampled_from([None, *later])))
    return pool[0]


@given(trees())
def test_a_walk_finds_what_named_modules_does_in_its_order(model):
    expected = {}
    for name, module in model.named_modules():
        expected[canonical(name)] = module
    assert list(canonical_modules(model)) == list(expected.items())


@given(trees())
def test_all_parameters_are_found_in_torchs_order(model):
    shared = nn.Parameter(torch.ones(1))
    for number, module in enumerate(model.modules()):
        module.register_parameter("own", nn.Parameter(torch.ones(1)))
        module.register_parameter("other", [None, shared][number % 2])
    assert [id(p) for p in parameters_of(model)] == [id(p) for p in model.parameters()]


def test_an_injection_walks_a_model_once(llama, monkeypatch):
    begun = []
    walk = names._walk
    monkeypatch.setattr(names, "_walk", lambda model: begun.append(model) or walk(model))
    inject_lora(llama, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias="lora_only"))
    assert begun == [llama]
    around = nn.ModuleDict({"inner": llama, "head": nn.Linear(4, 4)})
    inject_lora(around, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias="lora_only"))
    assert begun == [llama, around, llama]


def test_a_walk_is_forgotten_where_the_tree_may_have_changed():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with walked_once():
        with walked_once():
            assert len(dict(canonical_modules(model))) == 2
        model["b"] = nn.Linear(2, 2)
        assert len(dict(canonical_modules(model))) == 2
    assert len(dict(canonical_modules(model))) == 3


KEYS = ["q_proj", "0.q_proj", "layers.0.q_proj", r"layers\.\d+\..*", "^q_proj", "^layers.1.v", "l.yers", "v|q_proj", ""]
NAMES = ["layers.0.q_proj", "layers.1.v_proj", "q_proj", "layers.1.v", "x.layers.1.v", "layers", "my_q_proj", ""]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(KEYS), unique=True), st.sampled_from(NAMES))
def test_a_pattern_means_what_its_expression_means(keys, name):
    patterns = {key: position for position, key in enumerate(keys)}
    expected = next((patterns[key] for key in keys if re.match(rf"(.*\.)?({key})$", name)), -1)
    assert pattern_value(patterns, name, -1) == expected


def test_all_entries_that_mean_a_name_are_found():
    assert entries_for({"c", "b.c", "a.b", "a.b.c"}, "a.b.c") == ["a.b.c", "b.c", "c"]
    assert entries_for(r"a\..*", "a.b") == [r"a\..*"]
    assert entries_for({""}, "a") == []


def test_first_values_are_drawn_from_seed_and_name(llama):
    inject_lora(llama, LoraConfig(r=4), seed=3)
    for name, parameter in lora_parameters(llama).items():
        layer, _, local = name.rpartition(".")
        if local == "lora_B":
            assert not parameter.any()
            continue
        digest = hashlib.sha256(f"3/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
        assert torch.equal(parameter, drawn / math.sqrt(parameter.shape[1]))
