"""Shells: models of their own over one memory."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.sweeps.packed.shell import shell_of


def test_a_shell_has_all_memory_in_common_and_nothing_else(llama, tokens):
    shell = shell_of(llama)
    theirs = dict(llama.named_parameters())
    assert dict(shell.named_parameters()).keys() == theirs.keys()
    for name, parameter in shell.named_parameters():
        assert parameter is not theirs[name]
        assert parameter.data_ptr() == theirs[name].data_ptr()
        assert parameter.requires_grad == theirs[name].requires_grad
    buffers = dict(llama.named_buffers())
    assert buffers
    assert all(buffer is buffers[name] for name, buffer in shell.named_buffers())
    assert not {id(module) for module in shell.modules()} & {id(module) for module in llama.modules()}
    assert torch.equal(shell(tokens).logits, llama(tokens).logits)


def test_ties_are_kept():
    base = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    base["b"].weight = base["a"].weight
    shell = shell_of(base)
    assert shell["a"].weight is shell["b"].weight
    assert shell["a"].weight is not base["a"].weight


def test_what_is_done_to_a_shell_is_not_seen_by_others(llama, tokens):
    before = llama(tokens).logits
    one, other = shell_of(llama), shell_of(llama)
    inject_lora(one, LoraConfig(r=2, init_lora_weights=False), seed=0)
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert all(parameter.requires_grad for parameter in other.parameters())
    one.double().to("meta")
    one.config.use_cache = not llama.config.use_cache
    assert llama.config.use_cache != one.config.use_cache
    assert torch.equal(llama(tokens).logits, before)
    assert torch.equal(other(tokens).logits, before)


def test_buffers_that_are_replaced_and_gradients_stay_with_their_model():
    base = nn.BatchNorm1d(2)
    shell = shell_of(base)
    shell.double()
    shell.weight.grad = torch.ones(2, dtype=torch.float64)
    assert base.running_mean.dtype == torch.float32
    assert base.weight.grad is None
