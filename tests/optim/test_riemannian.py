"""Riemannian preconditioning against the formula in float64, against PEFT's, and what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.optim import SGD

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, lora_parameters
from lora_lightning.optim import fuse, lora_fa, lora_rite, precondition, riemannian, riemannian_sgd

LINEAR = {"target_modules": ["fc1", "fc2"]}


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
def test_the_steps_are_those_of_peft(lab, kind):
    model = lab.adapted(**LINEAR, rank_pattern={"fc2": 2}, modules_to_save=["head"])
    other, names = lab.theirs_of(model, **LINEAR, rank_pattern={"fc2": 2}, modules_to_save=["head"])
    if kind == "sgd":
        ours = riemannian_sgd(model, lr=1e-2, momentum=0.9)
        theirs = create_riemannian_optimizer(other, SGD, lr=1e-2, momentum=0.9)
    else:
        ours = riemannian(model, lr=1e-2, weight_decay=0.1)
        ours = fuse(ours, model) if kind == "fused" else ours
        theirs = create_riemannian_optimizer(other, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        lab.train(model, ours, 1, step)
        lab.train(other, theirs, 1, step)
        lab.assert_equal(model, other, names, rtol=1e-8, atol=1e-10)
    assert (kind == "fused") == bool(ours.param_groups[0]["fused"])


@settings(max_examples=15, deadline=None)
@given(n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 9), reg=st.floats(1e-3, 1.0))
def test_gradients_are_those_of_the_formula(n_in, n_out, r, reg):
    torch.manual_seed(n_in + 10 * n_out + 100 * r)
    model = nn.Sequential(nn.Linear(n_in, n_out).double())
    inject_lora(model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False))
    layer = model[0]
    optimizer = riemannian_sgd(model, lr=1.0, reg=reg)
    model(torch.randn(5, n_in, dtype=torch.float64)).square().sum().backward()
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    da, db = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    optimizer.step()
    eye = reg * torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(layer.lora_A, a - torch.linalg.solve(b.t() @ b + eye, da), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.lora_B, b - torch.linalg.solve(a @ a.t() + eye, db.t()).t(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_and_their_groups(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=groups).double())
    inject_lora(model, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    layer, reg = model[0], 0.1
    optimizer = riemannian_sgd(model, lr=1.0, reg=reg)
    model(torch.randn(2, 4, 8, dtype=torch.float64)).square().sum().backward()
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    da, db = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    optimizer.step()
    r = 4 // groups
    for g in range(groups):
        rows, outs = slice(g * r, g * r + r), slice(g * 6 // groups, (g + 1) * 6 // groups)
        a_g, b_g = a[rows].flatten(1), b[outs].flatten(1)
        eye = reg * torch.eye(r, dtype=torch.float64)
        wanted = da[rows].flatten(1), db[outs].flatten(1)
        torch.testing.assert_close(
            (a - layer.lora_A.detach())[rows].flatten(1), torch.linalg.inv(b_g.t() @ b_g + eye) @ wanted[0]
        )
        torch.testing.assert_close(
            (b - layer.lora_B.detach())[outs].flatten(1), wanted[1] @ torch.linalg.inv(a_g @ a_g.t() + eye)
        )


def test_the_update_hardly_depends_on_how_the_factors_share_their_size(lab):
    """``(cA, B/c)`` is the same adapter: without damping SGD moves ``B A`` by the same, where plain SGD does not."""

    def moved(c, reg):
        model = lab.adapted(**LINEAR)
        with torch.no_grad():
            model.fc1.lora_A.mul_(c)
            model.fc1.lora_B.div_(c)
        before = model.fc1.lora_weight_delta().detach()
        plain = SGD(lora_parameters(model).values(), lr=1e-4)
        lab.train(model, plain if reg is None else riemannian_sgd(model, lr=1e-4, reg=reg), 1)
        return model.fc1.lora_weight_delta().detach() - before

    torch.testing.assert_close(moved(7.0, 1e-12), moved(1.0, 1e-12), rtol=1e-3, atol=1e-9)
    assert (moved(7.0, None) - moved(1.0, None)).norm() > moved(1.0, None).norm()


def test_a_closure_runs_before_gradients_are_changed(lab):
    """Lightning hands a step the forward, the backward and the clipping."""
    model, twin = lab.adapted(), lab.adapted()
    optimizer, other = riemannian(model, lr=1e-2), riemannian(twin, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = lab.loss_of(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    lab.train(twin, other, 1)
    assert loss.requires_grad
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_gradients_changes_nothing(lab):
    model = lab.adapted()
    optimizer = riemannian(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_another_optimizer_over_the_same_model_can_be_preconditioned_and_a_strangers_cannot(lab):
    model = lab.adapted()
    optimizer = precondition(model, torch.optim.Adagrad(lora_parameters(model).values(), lr=1e-2))
    lab.train(model, optimizer, 2)
    with pytest.raises(LoraConfigError, match="DeepSpeed"):
        precondition(model, SGD([nn.Parameter(torch.ones(2))], lr=1)).step()
    with pytest.raises(LoraConfigError, match="reg must be positive"):
        riemannian(model, reg=0)


def test_half_precision_bases_are_stepped_in_float32(lab):
    model = lab.adapted(dtype=torch.bfloat16)
    assert model.fc1.lora_A.dtype == torch.float32
    lab.train(model, riemannian(model, lr=1e-2), 2)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [riemannian, riemannian_sgd, lora_rite, lora_fa])
def test_where_no_pair_trains_whole_it_is_told(lab, make):
    """MiCA freezes ``B``: without pairs these would be plain AdamW or SGD, under another name."""
    model = lab.net(torch.float32)
    inject_lora(model, LoraConfig(r=2, init_lora_weights="mica", **LINEAR))
    with pytest.raises(LoraConfigError, match="mica"):
        make(model)
    assert all(parameter.requires_grad for parameter in lora_parameters(model).values())
