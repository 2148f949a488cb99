"""DoRA's layers against the formula in float64 and against PEFT's; what is remembered of norms, and until when."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning.layers import DoraLayer, DoraLinear, adapt, dora_functional, dora_norm, restore
from lora_lightning.layers.dora_norm import adapted_norms
from lora_lightning.layers.dropout import draw, without

TINY = 1e-10


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 4, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(2, 4, 6)),
    "own forward": (lambda: OwnLinear(6, 5), lambda: torch.randn(2, 4, 6)),
    "conv1d": (_conv1d, lambda: torch.randn(2, 4, 6)),
    "embedding": (lambda: nn.Embedding(6, 5, padding_idx=0), lambda: torch.randint(0, 6, (2, 4))),
    "scaled embedding": (lambda: ScaledEmbedding(6, 5), lambda: torch.randint(0, 6, (2, 4))),
}


def _adapted(layer, r=3, scaling=2.0, dropout=0.0):
    adapt(layer, r, scaling * r, scaling, dropout, "dora")
    for parameter in layer.lora_own.values():
        nn.init.normal_(parameter)
    return layer


def _started(layer, **options):
    _adapted(layer, **options)
    with torch.no_grad():
        nn.init.zeros_(layer.lora_B)
        layer.lora_magnitude.copy_(layer.lora_derived()["lora_magnitude"])
    return layer


def _formula(x, layer, dropped_x=None):
    """The output of an adapted ``nn.Linear``, written for autograd."""
    norm = (layer.weight + layer.lora_scaling * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    low = (x if dropped_x is None else dropped_x) @ layer.lora_A.t() @ layer.lora_B.t()
    y = layer.lora_magnitude / norm * (F.linear(x, layer.weight) + layer.lora_scaling * low)
    return y if layer.bias is None else y + layer.bias


def _close(got, wanted, **tolerance):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": TINY, "atol": TINY}))


def _check_gradients(y, expected, inputs):
    _close([y], [expected])
    dy = torch.randn_like(expected)
    _close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.floats(-3, 3), st.booleans())
@example(2, 3, 2, 1, 0.0, True)
def test_output_and_all_gradients_equal_the_formula(rows, n_in, n_out, r, scaling, bias):
    torch.manual_seed(rows * 1000 + n_in * 100 + n_out * 10 + r)
    layer = _adapted(nn.Linear(n_in, n_out, bias=bias).double(), r, scaling)
    x = torch.randn(rows, 3, n_in, dtype=torch.float64, requires_grad=True)
    _check_gradients(layer(x), _formula(x, layer), [x, *layer.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, -2.0])
def test_any_magnitude_has_its_gradient(bias, magnitude):
    layer = _adapted(nn.Linear(6, 5, bias=bias).double())
    with torch.no_grad():
        layer.lora_magnitude[1:3] = magnitude
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    _check_gradients(layer(x), _formula(x, layer), [x, *layer.parameters()])


def test_a_large_bias_does_not_spoil_the_magnitudes_gradient():
    layer = _adapted(nn.Linear(64, 5))
    with torch.no_grad():
        layer.bias.fill_(1e5)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(32, 64)
    layer(x).sin().sum().backward()
    dy = layer(x).detach().double().cos()
    (wanted,) = torch.autograd.grad(_formula(x.double(), exact), exact.lora_magnitude, dy)
    torch.testing.assert_close(layer.lora_magnitude.grad.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.05, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_is_on_the_way_to_a_alone(dropout, bias):
    layer = _adapted(nn.Linear(40, 5, bias=bias).double(), dropout=dropout)
    x = torch.randn(3, 10, 40, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    kept = without(torch.ones(30, 40, dtype=torch.float64), draw(x.detach().view(30, 40), dropout), dropout).view_as(x)
    assert 0 < (kept == 0).sum() < kept.numel()
    _check_gradients(y, _formula(x, layer, x * kept / (1 - dropout)), [x, *layer.parameters()])


@pytest.mark.parametrize("kind", LAYERS)
def test_output_equals_the_plain_layer_with_the_merged_weight(kind):
    make, draw_input = LAYERS[kind]
    layer, x = make().double(), draw_input()
    x = x.double() if x.is_floating_point() else x
    merged = copy.deepcopy(layer)
    _adapted(layer)
    with torch.no_grad():
        merged.weight.copy_(layer.lora_merged(layer.weight, layer.lora_weight_delta()))
    _close([layer(x)], [merged(x)])
    in_features = 0 if layer.lora_in_first else 1
    _close([merged.weight.norm(dim=in_features)], [layer.lora_magnitude.abs()])


@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_base_and_is_restored_to_the_bit(kind):
    make, draw_input = LAYERS[kind]
    layer, x = make(), draw_input()
    plain, before = type(layer), layer(x)
    _started(layer)
    assert isinstance(layer, DoraLayer)
    assert isinstance(layer, plain)
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)
    for parameter in layer.lora_own.values():
        nn.init.normal_(parameter)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
    layer.lora_enabled = False
    assert torch.equal(layer(x), before)
    restore(layer)
    assert type(layer) is plain
    assert torch.equal(layer(x), before)
    assert not [name for name in vars(layer) if name.startswith("lora")]
    assert {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_starts_with_ratios_of_exactly_one(dtype):
    layer = _started(nn.Linear(300, 40).to(dtype))
    assert torch.equal(dora_functional.ratio(layer.lora_magnitude, layer.lora_norm()), torch.ones(40).to(layer.lora_A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_as_a_whole_it_still_starts_as_the_base(dtype):
    layer = _started(nn.Linear(300, 40).to(dtype)).to(dtype)
    assert layer.lora_magnitude.dtype == dtype
    assert torch.equal(dora_functional.ratio(layer.lora_magnitude, layer.lora_norm()), torch.ones(40))
    layer(torch.randn(3, 300, dtype=dtype)).float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.lora_own.values()} == {dtype}


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "embedding"])
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_pefts_layer_with_all_gradients(kind, rslora):
    from peft import LoraConfig, inject_adapter_in_model

    make, draw_input = LAYERS[kind]
    plain, x = make(), draw_input()
    ours, theirs = nn.ModuleDict({"a": copy.deepcopy(plain)}), nn.ModuleDict({"a": copy.deepcopy(plain)})
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=rslora, target_modules=["a"])
    config.fan_in_fan_out = kind == "conv1d"
    inject_adapter_in_model(config, theirs)
    layer, peft_layer = _adapted(ours["a"], 4, 6 / (2 if rslora else 4)), theirs["a"]
    low = ["embedding_A", "embedding_B"] if kind == "embedding" else ["A", "B"]
    pairs = [getattr(peft_layer, f"lora_{part}")["default"] for part in low]
    pairs = [getattr(pair, "weight", pair) for pair in pairs] + [peft_layer.lora_magnitude_vector["default"].weight]
    with torch.no_grad():
        for one, other in zip(layer.lora_own.values(), pairs, strict=True):
            other.copy_(one)
    inputs = [torch.randn_like(x).requires_grad_()] if x.is_floating_point() else []
    y, expected = layer(*inputs or [x]), peft_layer(*inputs or [x])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs + list(layer.lora_own.values()), dy)
    _close(got, torch.autograd.grad(expected, inputs + pairs, dy), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_on_one_input_compute_together_what_each_computes_alone(dropout):
    layers = [_adapted(nn.Linear(6, n, bias=bias).double(), dropout=dropout) for n, bias in ((5, False), (7, True))]
    x = torch.randn(3, 10, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    ys = DoraLinear.lora_together(x, layers)
    torch.manual_seed(1)
    kept = torch.ones(30, 6, dtype=torch.float64)
    if dropout:
        kept = without(kept, draw(x.detach().view(30, 6), dropout), dropout)
    dropped = x * kept.view_as(x) / (1 - dropout)
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    wanted = [_formula(x, layer, dropped) for layer in layers]
    one, other = (torch.autograd.grad(each[1].sum(), x, retain_graph=True) for each in (ys, wanted))
    _close(one, other)  # where the other layer's output is not used
    _check_gradients(torch.cat(ys, -1), torch.cat(wanted, -1), inputs)


# The norm


@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("part", [1, 7, 2**20])
def test_norms_are_those_of_the_sum_in_parts_of_any_size(monkeypatch, in_first, part):
    monkeypatch.setitem(dora_norm._ELEMENTS, "cpu", part)
    a, b, weight = torch.randn(3, 13).double(), torch.randn(11, 3).double(), torch.randn(11, 13).double()
    wanted = (weight + 0.7 * b @ a).norm(dim=1)
    got = adapted_norms(weight.t().contiguous() if in_first else weight, a, b, 0.7, in_first=in_first)
    _close([got], [wanted])


def test_norms_of_sums_that_nearly_vanish_keep_their_digits():
    a, b = torch.randn(4, 600), torch.randn(50, 4)
    rest = 1e-4 * torch.randn(50, 600)
    weight = (rest.double() - b.double() @ a.double()).float()
    wanted = (weight.double() + b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(adapted_norms(weight, a, b, 1.0).double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_without_weights_stays_and_harms_no_other(bias):
    layer = nn.Linear(6, 5, bias=bias)
    with torch.no_grad():
        layer.weight[2] = 0  # pruned
    x, before = torch.randn(4, 6, requires_grad=True), None
    before = layer(x)
    _started(layer)
    torch.testing.assert_close(layer(x), before)
    layer(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.fixture
def counted(monkeypatch):
    """How often norms were computed."""
    calls = []
    plain = adapted_norms

    def count(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr("lora_lightning.layers.dora.adapted_norms", count)
    return calls


def test_a_norm_is_computed_once_a_step(counted):
    layer = _adapted(nn.Linear(6, 5, bias=False))
    optimizer = torch.optim.AdamW(layer.lora_own.values(), fused=True)
    for step in range(3):
        for _ in range(4):  # batches that one step accumulates, each computed twice
            checkpoint(layer, torch.randn(3, 6, requires_grad=True), use_reentrant=False).sum().backward()
        assert len(counted) == step + 1
        optimizer.step()
    with torch.inference_mode():
        layer(torch.randn(3, 6))
        layer(torch.randn(3, 6))
    layer(torch.randn(3, 6)).sum().backward()
    assert len(counted) == 4


def _swapped(parameter, value):
    parameter.data = value


CHANGES = {
    "in place": lambda layer: layer.lora_A.detach().mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()}),
    "by pointer": lambda layer: _swapped(layer.lora_B, layer.lora_B.data * 2),
    "base": lambda layer: layer.weight.detach().mul_(2),
    "base by pointer": lambda layer: _swapped(layer.weight, layer.weight.data * 2),
    "dtype": lambda layer: layer.double(),
    "new parameter": lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.randn_like(layer.lora_A))),
    "scale of a copy": lambda layer: layer.lora_A.detach().copy_(torch.randn_like(layer.lora_A)),
    "fused SGD": lambda layer: torch.optim.SGD(layer.lora_own.values(), lr=0.1, fused=True).step(),
    "fused AdamW": lambda layer: torch.optim.AdamW(layer.lora_own.values(), lr=0.1, fused=True).step(),
    "scale": lambda layer: setattr(layer, "lora_scaling", 3.0),
    "past autograd, before a change of mode": lambda layer: (layer.lora_B.data.mul_(2), layer.eval()),
    "past autograd, with the mode set": lambda layer: (
        layer.lora_B.data.mul_(2),
        setattr(layer, "training", False),
    ),
    "foreach": lambda layer: torch.optim.AdamW(layer.lora_own.values(), lr=0.1, foreach=True).step(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change):
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    layer(x).sum().backward()
    CHANGES[change](layer)
    x = x.to(layer.weight.dtype)
    torch.testing.assert_close(layer(x), _formula(x, layer))


def test_an_optimizer_that_writes_past_autograd_is_noticed():
    class Past(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad)

    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    optimizer = Past(list(layer.lora_own.values()), {})
    layer(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer(x), _formula(x, layer))


def test_averages_that_are_swapped_in_for_validation_are_noticed():
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    own, average = layer.lora_B.detach().clone(), torch.randn(5, 3)
    layer(x).sum().backward()
    for values, mode in ((average, False), (own, True), (average, False), (own, False)):
        layer.train(mode)
        layer.lora_B.data.copy_(values)  # as Lightning's WeightAveraging does
        torch.testing.assert_close(layer(x), _formula(x, layer))


def test_memory_that_is_used_again_is_not_taken_for_the_same():
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    for _ in range(50):  # freed and allocated again at one place
        layer.lora_A.data = torch.randn(3, 6)
        torch.testing.assert_close(layer(x), _formula(x, layer))


# Autograd and its surroundings


def test_checkpointing_replays_the_same_dropout():
    layer, x = _adapted(nn.Linear(6, 5, bias=False), dropout=0.5), torch.randn(20, 6, requires_grad=True)
    inputs = [x, *layer.lora_own.values()]
    torch.manual_seed(5)
    plain = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.manual_seed(5)
    _close(torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), inputs), plain)
    torch.manual_seed(5)
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    _close([tensor.grad for tensor in inputs], plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_an_output_may_be_written_into(bias, recompute):
    layer, x = _adapted(nn.Linear(6, 5, bias=bias), dropout=0.3), torch.randn(2, 4, 6, requires_grad=True)
    inputs = [x, *layer.lora_own.values()]

    def block(x, in_place):
        y = layer(x)
        y = y.add_(1).relu_() if in_place else (y + 1).relu()
        return y.square().sum()

    results = []
    for in_place in (False, True):
        torch.manual_seed(5)
        loss = checkpoint(block, x, in_place, use_reentrant=False) if recompute else block(x, in_place)
        results.append(torch.autograd.grad(loss, inputs))
    _close(*results, rtol=1e-5, atol=1e-5)


def test_saved_is_the_input_once_and_the_output_that_is_there_anyway():
    layer = _adapted(nn.Linear(32, 48, bias=False), r=2, dropout=0.05)
    layer.weight.requires_grad_(False)
    x = torch.randn(64, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {x.data_ptr(), y.data_ptr()}


def test_what_needs_no_gradient_gets_none():
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    for parameter in (layer.weight, layer.bias, layer.lora_A):
        parameter.requires_grad_(False)
    layer(x).sum().backward()
    assert [parameter.grad is None for parameter in layer.parameters()] == [True, True, True, False, False]
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_second_derivatives_are_refused():
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half_base", [True, False])
def test_half_precision(dtype, bias, half_base):
    layer = _adapted(nn.Linear(64, 5, bias=bias), scaling=0.1)
    x = torch.randn(30, 64)
    exact = copy.deepcopy(layer).double()
    dy = torch.randn(30, 5)
    wanted = torch.autograd.grad(_formula(x.double(), exact), list(exact.lora_own.values()), dy.double())
    if half_base:
        layer.weight.data = layer.weight.data.to(dtype)
        if bias:
            layer.bias.data = layer.bias.data.to(dtype)
        y = layer(x.to(dtype))
    else:
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
    assert y.dtype == dtype
    y.backward(dy.to(dtype))
    for parameter, other in zip(layer.lora_own.values(), wanted, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_compiles_whole_with_equal_gradients(bias):
    torch._dynamo.reset()
    layer, x = _adapted(nn.Linear(6, 5, bias=bias)), torch.randn(2, 4, 6, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x, *layer.lora_own.values()]
    got = torch.autograd.grad(compiled(x).square().sum(), inputs)
    _close(got, torch.autograd.grad(layer(x).square().sum(), inputs), rtol=1e-5, atol=1e-5)


def test_torch_func_differentiates_it():
    layer, x = _adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    parameters = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).square().sum())(parameters)
    wanted = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    _close(got.values(), wanted, rtol=1e-5, atol=1e-5)


def test_a_quantised_weight_is_refused_with_the_remedy():
    layer = nn.Linear(6, 5)
    assert DoraLinear.lora_hindrance(layer) is None
    layer.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)
    assert "use_dora=False for a quantised base" in DoraLinear.lora_hindrance(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_on_cuda_it_is_the_formula_and_waits_for_nothing(dtype, bias):
    layer = _adapted(nn.Linear(256, 320, bias=bias), scaling=0.1)
    exact = copy.deepcopy(layer).double().cuda()
    for name, parameter in layer.cuda().named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora" in name else dtype)
    x, dy = torch.randn(2, 100, 256, device="cuda"), torch.randn(2, 100, 320, device="cuda")
    wanted = torch.autograd.grad(_formula(x.double(), exact), list(exact.lora_own.values()), dy.double())
    optimizer = torch.optim.SGD(layer.lora_own.values(), lr=0.0, fused=True)
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer(x.to(dtype))
            y.backward(dy.to(dtype))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for parameter, other in zip(layer.lora_own.values(), wanted, strict=True):
            assert (parameter.grad - other).norm() < (0.03 if dtype == torch.bfloat16 else 1e-4) * other.norm()
        optimizer.zero_grad()
