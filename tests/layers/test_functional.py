"""The written-out linear layer against the formula in float64, and against autograd's own gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora_lightning.layers.dropout import draw, without
from lora_lightning.layers.functional import Adapted, lora_linear, lora_linears


def _tensors(rows, n_in, n_out, r, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows * 1000 + n_in * 100 + n_out * 10 + r)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    return draw(rows, 3, n_in), draw(n_out, n_in), draw(n_out), draw(r, n_in), draw(n_out, r)


def _formula(x, w, b, lora_a, lora_b, scaling):
    return F.linear(x, w, b) + scaling * (x @ lora_a.t() @ lora_b.t())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.floats(-3, 3))
def test_output_and_all_gradients_equal_the_formula(rows, n_in, n_out, r, scaling):
    inputs = _tensors(rows, n_in, n_out, r)
    y = lora_linear(*inputs, scaling)
    expected = _formula(*inputs, scaling)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(y.shape, dtype=y.dtype)
    for got, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *tensors: lora_linear(*tensors, 1.5), _tensors(2, 4, 3, 2))


@pytest.mark.parametrize("dropout", [0.1, 0.4])  # places, a mask
def test_dropout_gradients_equal_those_of_the_elements_that_were_dropped(dropout):
    x, w, b, lora_a, lora_b = _tensors(50, 6, 5, 3)
    torch.manual_seed(1)
    y = lora_linear(x, w, b, lora_a, lora_b, 2.0, dropout)
    torch.manual_seed(1)
    kept = without(torch.ones(150, 6), draw(x.detach().reshape(-1, 6), dropout), dropout).view_as(x)
    assert 0 < (kept == 0).sum() < kept.numel()
    expected = F.linear(x, w, b) + 2.0 * (x * kept / (1 - dropout) @ lora_a.t() @ lora_b.t())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    inputs = (x, w, b, lora_a, lora_b)
    for got, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("unused", [None, 0, 2])
def test_layers_on_one_input_equal_each_by_itself(dropout, unused):
    x, *first = _tensors(40, 6, 5, 3)
    _, *second = _tensors(41, 6, 4, 2)
    _, *third = _tensors(42, 6, 7, 1)
    second[1] = None
    layers = [Adapted(*first, 2.0), Adapted(*second, 1.0), Adapted(*third, 0.5)]
    torch.manual_seed(3)
    got = lora_linears(x, layers, dropout)
    expected = []
    for layer in layers:
        torch.manual_seed(3)  # they share one draw
        expected += lora_linears(x, [layer], dropout)
    used = [place for place in range(3) if place != unused]
    wanted = [tensor for place in used for tensor in (x, *layers[place][:4]) if tensor is not None]
    dys = [torch.randn_like(out) for out in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad([got[place] for place in used], wanted, [dys[place] for place in used])
    theirs = torch.autograd.grad([expected[place] for place in used], wanted, [dys[place] for place in used])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=5)))
def test_each_gradient_may_be_wanted_or_not(trains):
    tensors = _tensors(3, 4, 5, 2)
    for tensor, wanted in zip(tensors, trains, strict=True):
        tensor.requires_grad_(wanted)
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    y, expected = lora_linear(*tensors, 1.5), _formula(*tensors, 1.5)
    assert y.requires_grad == expected.requires_grad
    if inputs:
        ours, theirs = torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_torch_func_takes_derivatives_through_it():
    x, w, b, lora_a, lora_b = (tensor.detach() for tensor in _tensors(2, 4, 3, 2))
    grad = torch.func.grad(lambda a: lora_linear(x, w, b, a, lora_b, 1.5).square().sum())(lora_a)
    expected = torch.func.grad(lambda a: _formula(x, w, b, a, lora_b, 1.5).square().sum())(lora_a)
    torch.testing.assert_close(grad, expected)


def test_checkpointing_replays_the_same_dropout():
    x, w, b, lora_a, lora_b = _tensors(20, 6, 5, 3)

    def layer(x):
        return lora_linear(x, w, b, lora_a, lora_b, 2.0, 0.5)

    torch.manual_seed(5)
    plain = torch.autograd.grad(layer(x).square().sum(), (x, lora_a, lora_b))
    torch.manual_seed(5)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), (x, lora_a, lora_b))
    for got, wanted in zip(again, plain, strict=True):
        assert torch.equal(got, wanted)


def test_a_frozen_weight_gets_no_gradient_and_the_input_none_where_it_needs_none():
    x, w, b, lora_a, lora_b = (tensor.detach() for tensor in _tensors(2, 4, 3, 2))
    lora_a.requires_grad_(), lora_b.requires_grad_()
    lora_linear(x, w, b, lora_a, lora_b, 1.0).sum().backward()
    assert (x.grad, w.grad, b.grad) == (None, None, None)
    assert lora_a.grad is not None


def test_only_the_input_is_saved_at_the_inputs_size():
    x, w, b, lora_a, lora_b = (tensor.detach() for tensor in _tensors(64, 32, 32, 2))
    x.requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, w, b, lora_a, lora_b, 1.0, 0.1)
    beside = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in {t.data_ptr() for t in (x, w)})
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1
    assert beside < 0.25 * x.nbytes


def test_second_derivatives_are_refused():
    x, w, b, lora_a, lora_b = _tensors(2, 4, 3, 2)
    (first,) = torch.autograd.grad(lora_linear(x, w, b, lora_a, lora_b, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_stay_in_the_parameters(dtype):
    x, w, b, lora_a, lora_b = (t.detach().float().requires_grad_() for t in _tensors(2, 4, 3, 2))
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(x, w, b, lora_a, lora_b, 1.0)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == x.grad.dtype == torch.float32
    expected = torch.autograd.grad(_formula(x, w, b, lora_a, lora_b, 1.0).sum(), lora_a)[0]
    torch.testing.assert_close(lora_a.grad, expected, rtol=0.05, atol=0.05)


def test_float32_adapters_over_a_bfloat16_base_compute_in_bfloat16():
    x, w, b, lora_a, lora_b = (t.detach() for t in _tensors(2, 4, 3, 2))
    x, w, b = x.bfloat16(), w.bfloat16(), b.bfloat16()
    lora_a, lora_b = lora_a.float().requires_grad_(), lora_b.float().requires_grad_()
    y = lora_linear(x, w, b, lora_a, lora_b, 1.0)
    y.float().sum().backward()
    assert (y.dtype, lora_a.grad.dtype) == (torch.bfloat16, torch.float32)


def test_compiles_whole_with_equal_gradients():
    torch._dynamo.reset()
    inputs = _tensors(2, 4, 3, 2, torch.float32)
    compiled = torch.compile(lambda *tensors: lora_linear(*tensors, 1.5), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    wanted = torch.autograd.grad(lora_linear(*inputs, 1.5).square().sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
