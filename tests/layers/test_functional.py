"""The written-out linear layer against the formula in float64, and against autograd's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora_lightning.layers.functional import keep_mask, kept_share, lora_linear


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


def test_dropout_gradients_equal_those_of_the_mask_that_was_drawn():
    x, w, b, lora_a, lora_b = _tensors(50, 6, 5, 3)
    torch.manual_seed(1)
    y = lora_linear(x, w, b, lora_a, lora_b, 2.0, 0.4)
    torch.manual_seed(1)
    mask = keep_mask(x.reshape(-1, 6), 0.4).view_as(x)
    dropped = x * mask / kept_share(x, 0.4)
    expected = F.linear(x, w, b) + 2.0 * (dropped @ lora_a.t() @ lora_b.t())
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = (x, w, b, lora_a, lora_b)
    for got, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.5, 0.9])
def test_masks_keep_the_stated_share_and_elements_are_independent(dropout):
    x = torch.empty(4000, 250)
    mask = keep_mask(x, dropout).double()
    share = kept_share(x, dropout)
    assert share == pytest.approx(1 - dropout, abs=1e-5)
    spread = (share * (1 - share) / mask.numel()) ** 0.5
    assert mask.mean().item() == pytest.approx(share, abs=5 * spread)
    flat = mask.flatten()
    for step in (1, 2, 3, 4, 250):  # neighbours, which share a draw, and columns
        together = (flat[:-step] * flat[step:]).mean().item()
        assert together == pytest.approx(share**2, abs=5 * spread)


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
    large = [tensor for tensor in saved if tensor.numel() >= x.numel()]
    assert sorted(str(tensor.dtype) for tensor in large) == ["torch.bool", "torch.float64"]


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
