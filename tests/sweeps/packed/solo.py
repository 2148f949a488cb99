"""What a job computes alone, for comparison: its own model in its own memory, its own random state."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.sweeps.packed.model import PackedModel
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.loss import IGNORED, causal_lm_loss

VOCABULARY = 64
ALL = "all-linear"
MIXED = [
    {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05},
    {"r": 8, "use_rslora": True, "lora_dropout": 0.3},
    {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    {"r": 3, "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"o_proj": 1}},
    {"r": 1, "target_modules": ["gate_proj", "k_proj"], "lora_dropout": 0.5},
]
"""Settings of jobs that differ in all that may."""


SIDES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of a tiny model of any architecture."""


def tiny_llama(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(**SIDES, **settings)
    model = LlamaForCausalLM(config).to(dtype).train()
    return _exact(model) if dtype == torch.float64 else model


def _exact(model):
    """With norms in double precision: Llama's own round to single, which turns a last bit into an eighth digit."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                setattr(parent, name, norm)
    return model


def adapted(model, config, seed=0):
    """Inject, and move the adapter so that it is not the identity."""
    inject_lora(model, LoraConfig(**config), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


class Twins:
    """Jobs on shells of one base, and each of them on a copy of the base of its own."""

    def __init__(self, base, configs):
        self.solo = [adapted(copy.deepcopy(base), config, seed) for seed, config in enumerate(configs)]
        self.shells = [adapted(shell_of(base), config, seed) for seed, config in enumerate(configs)]
        self.states = [torch.Generator().manual_seed(100 + seed).get_state() for seed in range(len(configs))]
        self.packed_states = list(self.states)

    @contextmanager
    def drawing(self, slot):
        before = torch.get_rng_state()
        torch.set_rng_state(self.packed_states[slot])
        try:
            yield
        finally:
            self.packed_states[slot] = torch.get_rng_state()
            torch.set_rng_state(before)

    def alone(self, slot, batch, *, train=True):
        """The loss, the number of labels, and gradients by name, of a job by itself."""
        model = self.solo[slot].train(train)
        model.zero_grad()
        torch.set_rng_state(self.states[slot])
        with torch.set_grad_enabled(train):
            loss = causal_lm_loss(model, batch)
        if train:
            loss.total.backward()
        self.states[slot] = torch.get_rng_state()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} if train else {}
        return loss.total.detach(), loss.terms, grads


def batch(rows, width, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, width), generator=generator)
    lengths = torch.randint(2, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = torch.where(mask.bool() & (torch.rand(ids.shape, generator=generator) < 0.7), ids, IGNORED)
    found = {"input_ids": ids * mask, "labels": labels}
    return found | {"attention_mask": mask} if masked else found


def by_name(model, gradients):
    """Gradients of a packed loss by the names of the parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: grad for p, grad in gradients}


def seated(configs, base=None):
    base = tiny_llama() if base is None else base
    twins, packed = Twins(base, configs), PackedModel(base)
    packed.seat(twins.shells)
    return twins, packed


def compare(twins, packed, batches, tolerance=1e-10):
    found = packed.losses(batches, train=True, drawing=twins.drawing)
    assert found.keys() == batches.keys()
    for slot, loss in found.items():
        total, terms, grads = twins.alone(slot, batches[slot])
        torch.testing.assert_close(loss.total, total, rtol=tolerance, atol=tolerance)
        assert loss.terms.dtype == torch.int64
        assert int(loss.terms) == int(terms)
        mine = by_name(twins.shells[slot], loss.gradients)
        assert mine.keys() == grads.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(grad, grads[name], rtol=tolerance, atol=tolerance)
        assert torch.equal(twins.states[slot], twins.packed_states[slot])
        assert not loss.total.requires_grad
