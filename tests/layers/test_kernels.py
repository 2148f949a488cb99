"""The kernels for CUDA against composed operations in double precision."""

import pytest
import torch
import torch.nn.functional as F

from lora_lightning.layers.dropout import add_product, draw, without
from lora_lightning.layers.functional import Adapted, lora_linears

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def _draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def _close(got, wanted, dtype, scale=1.0):
    tolerance = {name: value * scale for name, value in TOLERANCES[dtype].items()}
    torch.testing.assert_close(got.double(), wanted.double(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 3), (129, 1000, 16), (40, 136, 100)])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gated_product_and_its_gradients(dtype, shape, p):
    from lora_lightning.layers import kernels

    rows, f, r = shape
    gate, up, dh = (_draw(rows, f, dtype=dtype, seed=seed) for seed in range(3))
    g, a = _draw(rows, r, dtype=dtype, seed=3) / r, _draw(r, f, dtype=dtype, seed=4)
    seed = draw(gate, p) if p else None
    keeps = torch.ones_like(gate) if seed is None else without(torch.ones_like(gate), seed, p)
    wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
    expected = F.silu(wide[0]) * wide[1]
    h, kept = kernels.swiglu(gate, up, seed, p, whole=True)
    _close(h, expected, dtype)
    assert torch.equal(kept, h * keeps)
    assert torch.equal(kernels.swiglu(gate, up, seed, p, whole=False)[1], kept)
    wanted = torch.autograd.grad(expected, wide, dh.double() + keeps.double() * (g.double() @ a.double()))
    for got, want in zip(kernels.swiglu_backward(dh.clone(), gate, up, g, a, seed, p), wanted, strict=True):
        _close(got, want, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 576), (3, 4096), (2, 5000)])
@pytest.mark.parametrize("rounds_last", [False, True])
def test_norm_and_its_gradient(dtype, shape, rounds_last):
    from lora_lightning.layers import kernels

    x, dy, weight = _draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype, seed=1), _draw(shape[1], dtype=dtype, seed=2)
    wide = x.double().requires_grad_()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    y, rho = kernels.norm(x, weight, 1e-5, rounds_last)
    _close(y, expected, dtype)
    _close(kernels.norm_backward(dy, x, weight, rho), torch.autograd.grad(expected, wide, dy.double())[0], dtype, 3)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_elements_are_dropped_with_the_stated_probability_independently_of_others(p):
    torch.manual_seed(0)
    x = torch.ones(4000, 250, device="cuda")
    seed = draw(x, p)
    kept = without(x, seed, p).double()
    assert torch.equal(kept, without(x, seed, p).double())
    assert not torch.equal(kept, without(x, draw(x, p), p).double())
    share = 1 - p
    spread = (share * p / kept.numel()) ** 0.5
    assert kept.mean().item() == pytest.approx(share, abs=5 * spread)
    flat = kept.flatten()
    for step in (1, 2, 3, 4, 32, 250, 256, 4096):
        together = (flat[:-step] * flat[step:]).mean().item()
        assert together == pytest.approx(share**2, abs=5 * spread)
    other = without(x, draw(x, p), p).double()
    assert (kept * other).mean().item() == pytest.approx(share**2, abs=5 * spread)
    assert kept.mean(0).var().item() == pytest.approx(share * p / 4000, rel=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 130, 5), (64, 576, 16), (33, 200, 100)])
def test_a_product_is_added_where_nothing_was_dropped(dtype, shape):
    rows, d, r = shape
    dx, g, a = _draw(rows, d, dtype=dtype), _draw(rows, r, dtype=dtype, seed=1), _draw(r, d, dtype=dtype, seed=2)
    seed = draw(dx, 0.3)
    kept = without(torch.ones_like(dx), seed, 0.3).double()
    expected = dx.double() + kept * (g.double() @ a.double())
    add_product(dx, g, a, seed, 0.3)
    _close(dx, expected, dtype, 5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_on_one_input_give_what_autograd_gives(dropout):
    x = _draw(3, 40, 64).requires_grad_()
    layers = []
    for seed, out in enumerate((48, 32)):
        tensors = (_draw(out, 64, seed=seed), None, _draw(8, 64, seed=seed + 5), _draw(out, 8, seed=seed + 9))
        layers.append(Adapted(*(t if t is None else t.requires_grad_() for t in tensors), 2.0))
    torch.manual_seed(1)
    outs = lora_linears(x, layers, dropout)
    torch.manual_seed(1)
    flat = x.detach().reshape(-1, 64)
    kept = without(torch.ones_like(flat), draw(flat, dropout), dropout).view_as(x) if dropout else torch.ones_like(x)
    wide = [tensor.detach().double().requires_grad_() for layer in layers for tensor in layer[:4] if tensor is not None]
    wide_x = x.detach().double().requires_grad_()
    (w1, a1, b1), (w2, a2, b2) = wide[:3], wide[3:]
    dropped = wide_x * kept.double() / (1 - dropout)
    expected = [wide_x @ w.t() + 2 * (dropped @ a.t() @ b.t()) for w, a, b in ((w1, a1, b1), (w2, a2, b2))]
    dys = [torch.randn_like(out) for out in outs]
    mine = [tensor for layer in layers for tensor in layer[:4] if tensor is not None]
    got = torch.autograd.grad(outs, [x, *mine], dys)
    wanted = torch.autograd.grad(expected, [wide_x, *wide], [dy.double() for dy in dys])
    for one, other in zip(got, wanted, strict=True):
        _close(one, other, torch.float32, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 64, 80])
def test_rotation_rounds_as_composed_operations_do(dtype, width):
    from lora_lightning.layers.rotary import _composed, rotate

    q = _draw(2, 7, 3, width, dtype=dtype).transpose(1, 2).requires_grad_()
    k = _draw(2, 7, 1, width, dtype=dtype, seed=1).transpose(1, 2).requires_grad_()
    cos, sin = _draw(1, 7, width, dtype=dtype, seed=2), _draw(1, 7, width, dtype=dtype, seed=3)
    got = rotate(q, k, cos, sin)
    wanted = [_composed(x, cos[:, None], sin[:, None]) for x in (q, k)]
    dys = [torch.randn_like(one) for one in wanted]
    for one, other in zip(got, wanted, strict=True):
        _close(one, other, dtype)
    ours, theirs = torch.autograd.grad(got, (q, k), dys), torch.autograd.grad(wanted, (q, k), dys)
    for one, other in zip(ours, theirs, strict=True):
        _close(one, other, dtype)
