"""A small network with every kind of layer, in float64, adapted by us and by PEFT with the same values."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, inject_lora, lora_parameters


class Net(nn.Module):
    """Tokens to two numbers, by an embedding, linear layers, a norm and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.emb = nn.Embedding(11, 6)
        self.fc1 = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.fc2 = nn.Linear(9, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens):
        return self.head(self.fc2(self.norm(self.fc1(self.emb(tokens)).tanh())).tanh())


def net(dtype=torch.float64):
    return Net().to(dtype)


def adapted(config=None, dtype=torch.float64, **more):
    """An injected network whose ``B`` are not zero."""
    model = net(dtype)
    config = config or LoraConfig(**{"target_modules": ["emb", "fc1", "fc2"], "r": 3, "lora_alpha": 6, **more})
    inject_lora(model, config, seed=1)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "lora" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return model


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 11, (7, 4), generator=generator)
    wanted = torch.randn(7, 4, 2, generator=generator, dtype=torch.float64)
    out = model(tokens)
    return (out - wanted.to(out.dtype)).square().mean()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def theirs_of(model, **more):
    """PEFT's model with the values of an injected one, and the name there of each of its parameters here."""
    settings = {"target_modules": ["emb", "fc1", "fc2"], "r": 3, "lora_alpha": 6, **more}
    other = peft.get_peft_model(net(), peft.LoraConfig(**settings)).double()
    known = dict(other.named_parameters())
    names = {}
    for name, parameter in lora_parameters(model).items():
        layer, _, local = name.rpartition(".")
        kinds = {
            f"base_model.model.{layer}.{local}.default.weight",
            f"base_model.model.{layer}.lora_embedding_{local[-1]}.default",
            f"base_model.model.{layer}.lora_magnitude_vector.default.weight" if "magnitude" in local else "",
            f"base_model.model.{layer}.modules_to_save.default.{local}",
        }
        (names[name],) = kinds & known.keys()
        with torch.no_grad():
            known[names[name]].copy_(parameter)
    return other, names


def assert_equal(model, other, names, **tolerance):
    known = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(parameter, known[names[name]], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def lab():
    """The functions above."""
    import types

    return types.SimpleNamespace(**globals())
