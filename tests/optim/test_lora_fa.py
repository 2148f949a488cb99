"""LoRA-FA against PEFT's, step by step, and against the gradient that it stands for."""

import copy

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import LoraConfig, inject_lora, lora_parameters
from lora_lightning.layers.gated import LoraGated
from lora_lightning.optim import fuse, lora_fa

LINEAR = {"target_modules": ["fc1", "fc2"]}


@pytest.mark.parametrize("fused", [False, True])
def test_the_steps_are_those_of_peft(lab, fused):
    more = {**LINEAR, "rank_pattern": {"fc2": 2}, "alpha_pattern": {"fc1": 7}}
    model = lab.adapted(**more)
    other, names = lab.theirs_of(model, **more)
    theirs = create_lorafa_optimizer(other, r=3, lora_alpha=6, lr=1e-2)
    theirs.param_groups[0]["eps"] = eps = 1e-14  # it stands at another place there
    ours = lora_fa(model, lr=1e-2, eps=eps)
    ours = fuse(ours, model) if fused else ours
    for step in range(4):
        lab.train(model, ours, 1, step)
        lab.train(other, theirs, 1, step)
        lab.assert_equal(model, other, names, rtol=1e-7, atol=1e-9)
    assert ours.param_groups[0]["fused"] is (True if fused else None)


def test_a_does_not_train_and_all_else_does(lab):
    model = lab.adapted(use_dora=True, modules_to_save=["head"])
    before = {name: p.detach().clone() for name, p in lora_parameters(model).items()}
    optimizer = lora_fa(model, lr=1e-2)
    lab.train(model, optimizer, 2)
    still = {name for name, value in before.items() if torch.equal(value, model.get_parameter(name))}
    assert still == {"fc1.lora_A", "fc2.lora_A"}  # an embedding's A starts at zero: it has to train
    assert not still & lora_parameters(model).keys()
    assert model.fc1.lora_A.grad is None


def test_the_step_is_the_nearest_to_the_full_gradient(lab):
    """``s · dB A`` is the projection of the weight's full gradient on what ``A`` spans: a float64 formula."""
    model = lab.adapted(**LINEAR)
    model.fc2.weight.requires_grad_(True)
    lab.loss_of(model).backward()
    full, a, s = model.fc2.weight.grad, model.fc2.lora_A.detach(), model.fc2.lora_scaling
    model.fc2.weight.requires_grad_(False)
    optimizer = lora_fa(model)
    optimizer.step()
    corrected = s * model.fc2.lora_B.grad @ a
    torch.testing.assert_close(corrected, full @ a.t() @ torch.linalg.inv(a @ a.t()) @ a, rtol=1e-6, atol=1e-9)


def test_an_a_that_is_loaded_later_counts(lab):
    model = lab.adapted(**LINEAR)
    optimizer = lora_fa(model)
    lab.train(model, optimizer, 1)
    with torch.no_grad():
        model.fc1.lora_A.mul_(2)
    optimizer.zero_grad()
    lab.loss_of(model).backward()
    raw, a = model.fc1.lora_B.grad.clone(), model.fc1.lora_A.detach()
    optimizer.step()
    wanted = raw @ torch.linalg.inv(a @ a.t()) / model.fc1.lora_scaling**2
    torch.testing.assert_close(model.fc1.lora_B.grad, wanted, rtol=1e-6, atol=1e-9)


def test_layers_keep_no_input_for_backward(lab):
    """What LoRA-FA is for: of a frozen base and a frozen ``A``, backward needs ``x Aᵀ`` alone."""
    model = lab.adapted(target_modules=["fc1"])
    x = torch.randn(50, 6, dtype=torch.float64)
    kept = []
    lora_fa(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.fc1(x)
    assert torch.Size((50, 3)) in kept
    assert torch.Size((50, 6)) not in kept


def test_a_gated_block_keeps_no_input_either_and_its_gradients_are_right():
    """All of a transformer's blocks: gradients of ``B`` are those with ``A`` training, to the last digits."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).double()
    inject_lora(whole, LoraConfig(r=3, init_lora_weights=False), seed=1)
    part = copy.deepcopy(whole)
    lora_fa(part)
    ids = torch.arange(14).view(2, 7)
    for model in (whole, part):
        model(ids, use_cache=False).logits.square().sum().backward()
    for name, parameter in lora_parameters(part).items():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    mlp = part.model.layers[0].mlp
    assert isinstance(mlp, LoraGated)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        mlp(x)
    assert x.data_ptr() not in kept


def test_layers_that_are_frozen_altogether_stay_out(lab):
    model = lab.adapted(**LINEAR)
    model.fc2.lora_B.requires_grad_(False)
    before = model.fc2.lora_B.detach().clone()
    lab.train(model, lora_fa(model, lr=1e-2), 2)
    assert torch.equal(model.fc2.lora_B, before)


def test_a_layer_of_scale_zero_is_passed_over(lab):
    """Its update is zero whatever ``B`` is, and so is ``B``'s gradient: there is nothing to divide by."""
    model = lab.adapted(**LINEAR, alpha_pattern={"fc1": 0})
    before = model.fc1.lora_B.detach().clone(), model.fc2.lora_B.detach().clone()
    lab.train(model, lora_fa(model, lr=1e-2), 2)
    assert torch.equal(model.fc1.lora_B, before[0])
    assert not torch.equal(model.fc2.lora_B, before[1])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
