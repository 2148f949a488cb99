"""Packed layers against each slot's own `LoraLinear`, and what is told of inputs whose rows are nobody's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoraConfig, LoraConfigError, inject_lora
from lora_lightning.injection.state import lora_layers
from lora_lightning.injection.together import compute_together
from lora_lightning.layers.packed import PackedLoraLinear, Seating, Stack, pack, unpack

D = 6


class Attention(nn.Module):
    """Three layers on one input and one behind them."""

    def __init__(self, bias):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, 8, bias=bias), nn.Linear(D, 8, bias=bias), nn.Linear(D, 5, bias=bias)
        self.o = nn.Linear(5, D, bias=bias)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(v * (q * k).sum(-1, keepdim=True)) + x


NAMES = ("q", "k", "v", "o")


def _solo(base, number, config):
    model = copy.deepcopy(base)
    inject_lora(model, LoraConfig(**config), seed=number)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model.train()


def _packed(base, models, seating):
    """The base with all adapters; the models' parameters are views from then on."""
    model = copy.deepcopy(base).requires_grad_(False)
    own = [dict(lora_layers(each)) for each in models]
    for name in NAMES:
        if any(name in each for each in own):
            pack(getattr(model, name))
    compute_together(model)
    stacks, seen = [], set()
    for name in NAMES:
        layer = getattr(model, name)
        if isinstance(layer, PackedLoraLinear) and name not in seen:
            members = layer.lora_group.members if layer.lora_group else (layer,)
            names = [each for each in NAMES if any(getattr(model, each) is member for member in members)]
            seen |= set(names)
            stacks.append(Stack(members, [[each.get(local) for local in names] for each in own], seating))
    return model, stacks


class Draws:
    """A generator state for each slot."""

    def __init__(self, count):
        self.states = [torch.Generator().manual_seed(number).get_state() for number in range(count)]

    def __call__(self, slot):
        return _Drawing(self.states, slot)


class _Drawing:
    def __init__(self, states, slot):
        self.states, self.slot = states, slot

    def __enter__(self):
        self.before = torch.get_rng_state()
        torch.set_rng_state(self.states[self.slot])

    def __exit__(self, *_):
        self.states[self.slot] = torch.get_rng_state()
        torch.set_rng_state(self.before)


slots = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.sampled_from([1, 8, 32]),
        "use_rslora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.05, 0.5]),
        "target_modules": st.sets(st.sampled_from(NAMES), min_size=1).map(sorted),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    configs=st.lists(slots, min_size=1, max_size=5),
    rows=st.integers(1, 3),
    bias=st.booleans(),
    data=st.data(),
)
def test_outputs_and_gradients_are_those_of_each_adapter_alone(configs, rows, bias, data):
    torch.manual_seed(0)
    base = Attention(bias).double()
    widths = tuple(data.draw(st.integers(1, 7)) for _ in configs)
    inputs = [torch.randn(rows, width, D, dtype=torch.float64) for width in widths]
    models = [_solo(base, number, config) for number, config in enumerate(configs)]
    draws = Draws(len(configs))
    expected, gradients = [], []
    for slot, (model, x) in enumerate(zip(models, inputs, strict=True)):
        with draws(slot):
            y = model(x.requires_grad_())
        y.square().sum().backward()
        expected.append(y)
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])

    again = Draws(len(configs))
    seating = Seating(
        tuple(range(len(configs))), rows, widths, tuple(config["lora_dropout"] for config in configs), again
    )
    packed, stacks = _packed(base, models, seating)
    together = torch.zeros(len(configs), rows, seating.width, D, dtype=torch.float64)
    for slot, x in enumerate(inputs):
        together[slot, :, : widths[slot]] = x.detach()
    leaf = together.flatten(0, 1).requires_grad_()
    y = packed(leaf).unflatten(0, (len(configs), rows))
    mine = [y[slot, :, :width] for slot, width in enumerate(widths)]
    leaves = [leaf for stack in stacks for leaf in stack.leaves]
    found = torch.autograd.grad(sum(each.square().sum() for each in mine), [leaf, *leaves])
    dx = found[0].unflatten(0, (len(configs), rows))
    of = {id(stack_leaf): grad for stack_leaf, grad in zip(leaves, found[1:], strict=True)}
    by_parameter = {id(p): grad for stack in stacks for _, p, grad in stack.gradients(of)}
    for slot, model in enumerate(models):
        torch.testing.assert_close(mine[slot], expected[slot], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dx[slot, :, : widths[slot]], gradients[slot][0], rtol=1e-10, atol=1e-10)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, grad in zip(trained, gradients[slot][1:], strict=True):
            assert by_parameter[id(p)].stride() == p.stride()
            torch.testing.assert_close(by_parameter[id(p)], grad, rtol=1e-10, atol=1e-10)
        assert torch.equal(draws.states[slot], again.states[slot])


def _one(configs, rows=2, width=3, dtype=torch.float32):
    torch.manual_seed(0)
    base = Attention(True).to(dtype)
    models = [_solo(base, number, config) for number, config in enumerate(configs)]
    seating = Seating(tuple(range(len(models))), rows, (width,) * len(models), (0.0,) * len(models))
    return base, models, seating, *_packed(base, models, seating)


def test_parameters_are_dense_views_of_the_stacks_and_what_fills_up_never_moves():
    _, models, _, _, stacks = _one([{"r": 2}, {"r": 4, "target_modules": ["q", "v"]}])
    stacks[0].a.data.add_(1)  # the padding too, to see who looks at it
    first, second = models
    assert first.q.lora_A.data_ptr() == stacks[0].a.data_ptr()
    assert second.v.lora_B.shape == (5, 4)
    assert second.v.lora_B.untyped_storage().data_ptr() == stacks[0].bs[2].untyped_storage().data_ptr()
    for model in models:
        for _, layer in lora_layers(model):
            for parameter in layer.lora_own.values():
                assert torch.empty_like(parameter).stride() == parameter.stride()  # dense, in whatever order
    assert not stacks[0].bs[0][0, 2:].any()
    assert not stacks[0].bs[1][1].any()


@pytest.mark.parametrize("slots", [(1,), (0, 2), (1, 2), (2,)])
def test_some_slots_alone(slots):
    _, models, seating, packed, _ = _one([{"r": 2}, {"r": 4, "target_modules": ["q", "v"]}, {"r": 1}])
    seating.slots, seating.widths, seating.dropout = slots, (3,) * len(slots), (0.0,) * len(slots)
    x = torch.randn(2 * len(slots), 3, D)
    with torch.no_grad():
        y = packed(x)
        for place, slot in enumerate(slots):
            mine = slice(2 * place, 2 * place + 2)
            torch.testing.assert_close(y[mine], models[slot].eval()(x[mine]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["x", "A", "B"])
def test_a_slot_that_is_not_a_number_leaves_the_bits_of_the_others(what):
    _, models, _, packed, stacks = _one([{"r": 2}, {"r": 4, "target_modules": ["q", "v"]}, {"r": 1}])
    x = torch.randn(6, 3, D)

    def run():
        leaf = x.clone().requires_grad_()
        y = packed(leaf)
        leaves = [each for stack in stacks for each in stack.leaves]
        dx, *found = torch.autograd.grad(y.unflatten(0, (3, 2)).square().sum((1, 2, 3)).sum(), [leaf, *leaves])
        others = [0, 2]
        tensors = [y.unflatten(0, (3, 2)), dx.unflatten(0, (3, 2)), *found]
        return [tensor[others] for tensor in tensors], tensors

    before, _ = run()
    if what == "x":
        x[2:4] = float("nan")
    else:
        getattr(models[1].q, f"lora_{what}").data.fill_(float("nan"))
    after, whole = run()
    assert whole[0][1].isnan().any()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, D), (6, 4, D), (2, 9, D)])
def test_rows_that_are_nobodys_are_refused(shape):
    _, _, _, packed, _ = _one([{"r": 2}, {"r": 1}, {"r": 1}])
    with pytest.raises(LoraConfigError, match="which row is whose"):
        packed.o(torch.randn(*shape[:-1], 5))


def test_half_precision_inputs_and_autocast():
    _, models, _, packed, stacks = _one([{"r": 2}, {"r": 4}])
    x = torch.randn(4, 3, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        for slot in (0, 1):
            mine = slice(2 * slot, 2 * slot + 2)
            torch.testing.assert_close(y[mine], models[slot](x[mine]), rtol=2e-2, atol=2e-2)
        found = torch.autograd.grad(y.float().sum(), [leaf for stack in stacks for leaf in stack.leaves])
    assert all(grad.dtype == torch.float32 for grad in found)


def test_unpacked_layers_are_what_they_were():
    base = Attention(True)
    layer, kind = base.q, type(base.q)
    pack(layer)
    assert isinstance(layer, PackedLoraLinear)
    unpack(layer)
    assert type(layer) is kind
    assert not [name for name in vars(layer) if name.startswith("lora")]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_on_a_gpu_the_draws_are_those_of_each_adapter_alone(dropout):
    torch.manual_seed(0)
    base = Attention(True).cuda()
    configs = [{"r": 2, "lora_dropout": dropout}, {"r": 4, "lora_dropout": dropout, "target_modules": ["q", "o"]}]
    models = [_solo(base, number, config) for number, config in enumerate(configs)]
    states = [torch.cuda.get_rng_state()] * 2

    class Drawing:
        def __init__(self, slot):
            self.slot = slot

        def __enter__(self):
            torch.cuda.set_rng_state(states[self.slot])

        def __exit__(self, *_):
            states[self.slot] = torch.cuda.get_rng_state()

    start = list(states)
    inputs = [torch.randn(2, width, D, device="cuda") for width in (3, 5)]
    expected = []
    for model, x, state in zip(models, inputs, start, strict=True):
        torch.cuda.set_rng_state(state)
        y = model(x)
        y.square().sum().backward()
        expected.append((y, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    seating = Seating((0, 1), 2, (3, 5), (dropout,) * 2, Drawing)
    packed, stacks = _packed(base, models, seating)
    together = torch.zeros(2, 2, 5, D, device="cuda")
    for slot, x in enumerate(inputs):
        together[slot, :, : x.shape[1]] = x
    y = packed(together.flatten(0, 1)).unflatten(0, (2, 2))
    leaves = [leaf for stack in stacks for leaf in stack.leaves]
    total = sum(y[slot, :, : x.shape[1]].square().sum() for slot, x in enumerate(inputs))
    of = {id(leaf): grad for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True)}
    found = {id(p): grad for stack in stacks for _, p, grad in stack.gradients(of)}
    for slot, (model, (alone, grads)) in enumerate(zip(models, expected, strict=True)):
        torch.testing.assert_close(y[slot, :, : alone.shape[1]], alone, rtol=1e-3, atol=1e-3)
        for name, p in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(found[id(p)], grads[name], rtol=1e-2, atol=1e-2)
