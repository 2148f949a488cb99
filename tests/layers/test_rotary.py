"""The rotation against the formula, values to the bit and gradients in double precision."""

import pytest
import torch

from lora_lightning.layers.rotary import _composed, rotate


def _inputs(dtype, batch=1):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 3, 8, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 7, 1, 8, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(batch, 7, 8, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    return q, k, cos, sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_values_are_those_of_composed_operations_to_the_bit(dtype, batch):
    q, k, cos, sin = _inputs(dtype, batch)
    for got, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(got, _composed(x, cos[:, None], sin[:, None]))


def test_gradients():
    q, k, cos, sin = _inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))
    cos.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, cos: rotate(q, k, cos, sin), (q, cos))


def test_heads_behind_tokens():
    q, k, cos, sin = _inputs(torch.float32)
    behind = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for one, other in zip(behind, rotate(q, k, cos, sin), strict=True):
        torch.testing.assert_close(one.transpose(1, 2), other)


def test_torch_func():
    q, k, cos, sin = _inputs(torch.float64)
    grad = torch.func.grad(lambda q: rotate(q, k, cos, sin)[0].square().sum())(q.detach())
    (expected,) = torch.autograd.grad(rotate(q, k, cos, sin)[0].square().sum(), q)
    torch.testing.assert_close(grad, expected)
