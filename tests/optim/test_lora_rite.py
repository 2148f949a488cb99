"""LoRA-RITE: what it promises, exactly, and its first steps by hand in float64."""

import pytest
import torch

from lora_lightning import lora_parameters
from lora_lightning.optim import lora_plus, lora_rite

LINEAR = {"target_modules": ["fc1", "fc2"]}


def _updates(lab, make, change=None, steps=5):
    """``B A`` of a layer after each step, its factors changed beforehand by ``(R A, B R⁻¹)``."""
    model = lab.adapted(**LINEAR)
    for layer in (model.fc1, model.fc2) if change is not None else ():
        with torch.no_grad():
            layer.lora_A.copy_(change @ layer.lora_A)
            layer.lora_B.copy_(layer.lora_B @ torch.linalg.inv(change))
    optimizer, seen = make(model), []
    for step in range(steps):
        lab.train(model, optimizer, 1, step)
        seen.append(torch.cat([layer.lora_weight_delta().detach().flatten() for layer in (model.fc1, model.fc2)]))
    return torch.stack(seen)


def test_the_adapter_learns_the_same_whatever_its_factors_are(lab):
    """Any invertible change of the r coordinates between them; of Adam's steps this is far from true."""
    change = torch.tensor([[3.0, 1.0, 0.0], [0.5, -0.2, 0.1], [0.0, 0.0, 7.0]], dtype=torch.float64)

    def make(model):
        return lora_rite(model, lr=1e-2, eps=0.0)

    plain = _updates(lab, make)
    torch.testing.assert_close(_updates(lab, make, change), plain, rtol=1e-6, atol=1e-8)

    def adam(model):
        return lora_plus(model, lr=1e-2, ratio=1.0)

    assert (_updates(lab, adam, change) - _updates(lab, adam)).norm() > 0.1


def test_two_steps_by_hand(lab):
    model = lab.adapted(**LINEAR)
    optimizer = lora_rite(model, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    a_moment = second = escaped = basis = None
    for step in range(2):
        optimizer.zero_grad()
        lab.loss_of(model, step).backward()
        b, db = model.fc1.lora_B.detach().clone(), model.fc1.lora_B.grad.clone()
        u, r = torch.linalg.qr(model.fc1.lora_A.detach().clone().t())
        inverse = torch.linalg.inv(r)
        g = db @ inverse
        beta1, beta2 = (0.0, 0.0) if step == 0 else (0.9 * 0.1 / 0.19, 0.99 * 0.01 / 0.0199)
        if step == 0:
            second, escaped, a_moment = g.t() @ g / 9, torch.zeros(()).double(), torch.zeros_like(g)
        else:
            turn = u.t() @ basis
            turned = turn @ second @ turn.t()
            differences = torch.linalg.eigvalsh(second) - torch.linalg.eigvalsh(turned)
            lost = min(differences.max(), (second - turned).trace()).clamp(min=0)
            second, escaped = beta2 * turned + (1 - beta2) * g.t() @ g / 9, beta2 * (escaped + lost)
            a_moment = a_moment @ turn.t()
        values, vectors = torch.linalg.eigh(second)
        step_ = g @ vectors @ torch.diag(1 / ((values + escaped).sqrt() + 1e-6)) @ vectors.t()
        a_moment = beta1 * a_moment + (1 - beta1) * step_
        basis = u
        optimizer.step()
        wanted = b * (1 - 1e-3) - 1e-2 * a_moment @ inverse.t()
        torch.testing.assert_close(model.fc1.lora_B.detach(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("r", [2, 8])
def test_it_starts_from_a_b_of_zero_at_any_rank(lab, r):
    model = lab.adapted(
        r=r, lora_alpha=r, use_dora=True, modules_to_save=["head"], target_modules=["emb", "fc1", "fc2"]
    )
    with torch.no_grad():
        model.fc1.lora_B.zero_()
        model.fc2.lora_B.zero_()
        model.emb.lora_A.zero_()
    before = {name: p.detach().clone() for name, p in lora_parameters(model).items()}
    first = sum(lab.loss_of(model, step).item() for step in range(20))
    optimizer = lora_rite(model, lr=1e-2)
    lab.train(model, optimizer, 20)
    assert sum(lab.loss_of(model, step).item() for step in range(20)) < first
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in lora_parameters(model).items())


def test_its_state_is_saved_and_goes_on(lab):
    whole, parts = lab.adapted(), lab.adapted()
    lab.train(whole, lora_rite(whole), 4)
    first = lora_rite(parts)
    lab.train(parts, first, 2)
    then = lora_rite(parts)
    then.load_state_dict(first.state_dict())
    lab.train(parts, then, 2, start=2)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fused", [None, True])
def test_a_loss_scaler_passes_over_a_step_of_infinities(lab, fused):
    """The scaler has to unscale by itself: torch's fused kernel, to which it would leave it, steps on no pair."""
    model, other = lab.adapted(dtype=torch.float32), lab.adapted(dtype=torch.float32)
    optimizer, plain = (lora_rite(each, lr=1e-2, fused=fused) for each in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(lab.loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    lab.train(other, plain, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_half_precision_goes_on_exactly(lab):
    """Moments are kept in float32 beside bfloat16 factors, where torch loads state in the dtype of its parameter."""
    whole, parts = lab.adapted().to(torch.bfloat16), lab.adapted().to(torch.bfloat16)
    lab.train(whole, lora_rite(whole, lr=1e-2), 4)
    first = lora_rite(parts, lr=1e-2)
    lab.train(parts, first, 2)
    then, state = lora_rite(parts, lr=1e-2), first.state_dict()
    then.load_state_dict(state)
    for parameter, held in first.state.items():
        assert all(torch.equal(value, then.state[parameter][key]) for key, value in held.items())
    lab.train(parts, then, 2, start=2)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q)
    assert then.state[parts.fc1.lora_A]["second_moment"].dtype == torch.float32
