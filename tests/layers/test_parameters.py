"""Adapted parameters: experts of mixtures against PEFT and against the formula, files both ways, and the way back."""

import copy
import pickle
import warnings
import weakref

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import (
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.state import lora_layers
from lora_lightning.layers.parameters import LoraParameter

EXACT = {"atol": 1e-10, "rtol": 1e-10}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def mixtral(experts="eager"):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return _double(MixtralForCausalLM(config), experts)


def qwen3(experts="eager"):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=12, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2
    )
    return _double(Qwen3MoeForCausalLM(config), experts)


def gpt_oss(experts="eager"):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return _double(GptOssForCausalLM(config), experts)


def _double(model, experts):
    model.config._experts_implementation = experts
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.double().eval()


MODELS = {"mixtral": mixtral, "qwen3": qwen3, "gpt_oss": gpt_oss}


def _theirs(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval().double()


@pytest.mark.parametrize("name", MODELS)
def test_files_travel_both_ways_with_equal_outputs(name, tokens, shake, tmp_path):
    base = MODELS[name]()
    model = copy.deepcopy(base)
    config = LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=BOTH,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={r"layers\.1\..*gate_up_proj": 5},
    )
    inject_lora(model, config)
    shake(model)
    logits = model(tokens).logits
    assert not torch.allclose(logits, base(tokens).logits)
    theirs = _theirs(base, save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(base(tokens).logits, logits, **EXACT)
    assert {n: p.shape for n, p in lora_parameters(model).items()} == {
        n: t.shape for n, t in base.state_dict().items() if ".lora_" in n or n.endswith(("lora_A", "lora_B"))
    }


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_sees_the_adapter(name, experts, tokens, shake):
    model = MODELS[name](experts)
    close = {"atol": 1e-9, "rtol": 1e-9}
    if experts == "grouped_mm":  # its kernel knows no float64
        model, close = model.float(), {"atol": 1e-4, "rtol": 1e-4}
    inject_lora(model, LoraConfig(r=4, target_modules=[], target_parameters=BOTH))
    shake(model)
    named = lora_parameters(model)
    loss = model(tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, list(named.values()))
    reference = copy.deepcopy(model)
    reference.config._experts_implementation = "eager"
    expected = reference(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, **close)
    wanted = torch.autograd.grad(expected, list(lora_parameters(reference).values()))
    for parameter, gradient, right in zip(named, gradients, wanted, strict=True):
        assert right.abs().max() > 0, parameter
        torch.testing.assert_close(gradient, right, **close)


def test_gradients_are_pefts(tokens, shake, tmp_path):
    base = mixtral()
    model = copy.deepcopy(base)
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    shake(model)
    theirs = _theirs(base, save_adapter(model, tmp_path / "a"))
    model(tokens, labels=tokens).loss.backward()
    layers = {f"layers.{i}.mlp.experts": theirs.base_model.model.model.layers[i].mlp.experts for i in range(2)}
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    theirs(tokens, labels=tokens).loss.backward()
    for name, outer in layers.items():
        ours = model.get_submodule(f"model.{name}")
        for wrapper, child in ((outer, ours.lora_down_proj), (outer.base_layer, ours.lora_gate_up_proj)):
            torch.testing.assert_close(child.lora_A.grad, wrapper.lora_A["default"].weight.grad, **EXACT)
            torch.testing.assert_close(child.lora_B.grad, wrapper.lora_B["default"].weight.grad, **EXACT)


class Stack(nn.Module):
    """``(E, …, …)`` applied to ``(E, tokens, in)``."""

    def __init__(self, experts, rows, columns, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.matrices = nn.Parameter(torch.randn(experts, rows, columns, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x @ (self.matrices if self.is_transposed else self.matrices.mT)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans())
def test_the_update_is_that_of_each_expert(experts, rows, columns, r, transposed, rslora):
    torch.manual_seed(0)
    model = nn.ModuleDict({"stack": Stack(experts, rows, columns, transposed)})
    stack, base = model["stack"], model["stack"].matrices.detach().clone()
    fields = {"target_modules": [], "target_parameters": ["matrices"], "init_lora_weights": False}
    report = inject_lora(model, LoraConfig(r=r, lora_alpha=3, use_rslora=rslora, **fields))
    n_in, n_out = (rows, columns) if transposed else (columns, rows)
    layer, scale = stack.lora_matrices, 3 / (r**0.5 if rslora else r)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((experts * r, n_in), (n_out, r * experts))
    assert report.rows[0].shape == (n_in, n_out)
    x = torch.randn(experts, 3, n_in, dtype=torch.float64)
    for expert, got in enumerate(stack(x)):
        a = layer.lora_A[expert * r : (expert + 1) * r]  # expert-major
        b = layer.lora_B[:, expert::experts]  # rank-major, the expert fastest
        weight = base[expert].T if transposed else base[expert]
        torch.testing.assert_close(got, x[expert] @ (weight + scale * b @ a).T, **EXACT)
    adapted = stack(x).detach()
    assert torch.equal(stack.matrices, base)
    merge_lora(model)
    assert type(stack) is Stack
    torch.testing.assert_close(stack(x), adapted, **EXACT)


def test_a_matrix_of_a_plain_layer(tokens, llama, shake, tmp_path):
    base = copy.deepcopy(llama.double())
    model = copy.deepcopy(base)
    inject_lora(model, LoraConfig(r=3, target_modules=["v_proj"], target_parameters=["q_proj.weight"]))
    shake(model)
    logits = model(tokens).logits
    theirs = _theirs(base, save_adapter(model, tmp_path / "a"))
    torch.testing.assert_close(theirs(tokens).logits, logits, **EXACT)
    same = copy.deepcopy(base)
    inject_lora(same, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    values = {name.replace("lora_weight.", ""): value for name, value in lora_parameters(model).items()}
    with torch.no_grad():
        for name, parameter in lora_parameters(same).items():
            parameter.copy_(values[name])
    torch.testing.assert_close(same(tokens).logits, logits, **EXACT)


def test_the_way_back_and_the_state_in_between(tokens, shake):
    model = mixtral()
    before, logits = {n: v.clone() for n, v in model.state_dict().items()}, model(tokens).logits
    classes = [type(module) for module in model.modules()]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH)
    report = inject_lora(model, config, seed=4)
    assert torch.equal(model(tokens).logits, logits)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    assert report.trainable_parameters == sum(row.parameters for row in report.rows)
    first = {name: value.clone() for name, value in lora_parameters(model).items()}
    assert inject_lora(model, config).rows == report.rows
    assert all(
        value is lora_parameters(model)[name] or torch.equal(value, first[name]) for name, value in first.items()
    )
    shake(model)
    adapted = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, adapted)
        twin_experts = twin.model.layers[0].mlp.experts
        assert twin_experts.lora_down_proj.lora_holder is twin_experts
    with lora_disabled(model):
        assert torch.equal(model(tokens).logits, logits)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(merged(tokens).logits, adapted, **EXACT)
    assert [type(module) for module in merged.modules()] == classes
    unload_lora(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_nothing_of_the_sum_outlives_a_forward(tokens):
    model = mixtral()
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH, init_lora_weights=False))
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        model(tokens)
    assert "gate_up_proj" not in vars(experts)
    with pytest.raises(RuntimeError):
        experts(torch.ones(1, 3), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    assert not {"gate_up_proj", "down_proj"} & vars(experts).keys()
    assert experts.gate_up_proj is experts._parameters["gate_up_proj"]


def test_gradient_checkpointing_recomputes_the_same(tokens, shake):
    model = mixtral()
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    shake(model)
    model.train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, twin):
        each(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in lora_parameters(model).items():
        assert torch.equal(parameter.grad, lora_parameters(twin)[name].grad), name


def test_a_half_precision_base(tokens, shake):
    model = mixtral().bfloat16()
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    shake(model)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model).values())
    layer = dict(lora_layers(model))["model.layers.0.mlp.experts.lora_down_proj"]
    exact = layer.weight.float() + layer.lora_weight_delta()
    merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, exact.bfloat16())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["experts.gate_up"]}, "did you mean gate_up_proj.*experts.gate_up_proj \\(×2\\)"),
        ({"lora_dropout": 0.1}, "does not go with lora_dropout=0.1"),
        ({"use_dora": True}, "does not go with use_dora=True"),
        ({"init_lora_weights": "orthogonal"}, "does not go with init_lora_weights='orthogonal'"),
        ({"target_parameters": ["norm.weight"]}, "its shape is \\(16,\\); parameters of two and of three"),
        ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "is adapted or trained in full as a"),
        ({"modules_to_save": ["experts"]}, "is adapted or trained in full as a whole"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(fields, message):
    model = mixtral()
    classes, before = [type(m) for m in model.modules()], set(model.state_dict())
    with pytest.raises(LoraConfigError, match=message):
        inject_lora(model, LoraConfig(r=2, **{"target_modules": [], "target_parameters": BOTH, **fields}))
    assert [type(m) for m in model.modules()] == classes
    assert set(model.state_dict()) == before


def test_experts_that_are_spread_over_processes_are_told(tokens, tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = mixtral()
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    experts = model.model.layers[0].mlp.experts
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spread = distribute_tensor(experts.down_proj.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        experts._parameters["down_proj"] = nn.Parameter(spread, requires_grad=False)
        with pytest.raises(LoraConfigError, match="down_proj of a MixtralExperts is spread over processes"):
            model(tokens)
    finally:
        dist.destroy_process_group()


def test_autograd_keeps_no_sum_and_makes_it_again(tokens, monkeypatch):
    model = mixtral()
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH, init_lora_weights=False))
    values = []
    make = LoraParameter.lora_value

    def watched(layer, weight):
        value = make(layer, weight)
        values.append(weakref.ref(value))
        return value

    monkeypatch.setattr(LoraParameter, "lora_value", watched)
    loss = model(tokens, labels=tokens).loss
    assert len(values) == 4
    assert not any(value() is not None for value in values)
    loss.backward()
    assert len(values) == 7  # each once more, but the first, whose input needs no gradient
    assert not any(value() is not None for value in values)
    named = lora_parameters(model)
    got = {name: parameter.grad.clone() for name, parameter in named.items()}
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):  # not ours
        loss = model(tokens, labels=tokens).loss
    assert sum(value() is not None for value in values[7:]) == 3
    loss.backward()
    assert all(torch.equal(parameter.grad, got[name]) for name, parameter in named.items())
    loss = model(tokens, labels=tokens).loss
    with torch.no_grad():
        named["model.layers.0.mlp.experts.lora_down_proj.lora_A"].add_(1)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_in_one_compiled_graph():
    torch.manual_seed(0)
    model = nn.ModuleDict({"stack": Stack(3, 4, 5, False)})
    fields = {"target_modules": [], "target_parameters": ["matrices"], "init_lora_weights": False}
    inject_lora(model, LoraConfig(r=2, **fields))
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    expected = model["stack"](x)
    layer = model["stack"].lora_matrices
    wanted = torch.autograd.grad(expected.sum(), [layer.lora_A, layer.lora_B])
    compiled = torch.compile(model["stack"], backend="aot_eager", fullgraph=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected, **EXACT)
    for gradient, right in zip(torch.autograd.grad(got.sum(), [layer.lora_A, layer.lora_B]), wanted, strict=True):
        torch.testing.assert_close(gradient, right, **EXACT)
    assert "matrices" not in vars(model["stack"])
