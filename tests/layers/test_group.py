"""Layers on one input hand out beforehand only what a call would give, and hold nothing longer than they should."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, inject_lora


class Two(nn.Module):
    def __init__(self, change=None):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.change = change

    def forward(self, x):
        y = self.q(x)
        if self.change is not None:
            self.change(self, x)
        return y + self.k(x)


def _two(change=None, **options):
    torch.manual_seed(0)
    model = Two(change)
    inject_lora(model, LoraConfig(r=2, **options), seed=0)
    for layer in (model.q, model.k):
        nn.init.normal_(layer.lora_B)
    assert model.q.lora_group is model.k.lora_group is not None
    return model


def _by_itself(layer, x):
    return layer.lora_together(x, [layer])[0]


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_that_is_let_go_is_freed_at_once(dora):
    model = _two(use_dora=dora)
    model(torch.randn(3, 4)).sum().backward()
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(model.q.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_input_that_changes_between_the_calls(mode):
    model = _two(lambda model, x: x.mul_(2))
    with mode():
        x = torch.randn(3, 4)
        expected = _by_itself(model.q, x) + _by_itself(model.k, x * 2)
        torch.testing.assert_close(model(x.clone()), expected)


class Changing(Two):
    def forward(self, x):
        y = self.q(x)
        x.mul_(2)
        return y + self.k(x)


class Writing(Two):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.q(x) + self.act(x) + self.k(x)


@pytest.mark.parametrize("kind", [Changing, Writing])
def test_an_input_that_is_said_to_change_between_the_calls_also_where_changes_are_not_counted(kind):
    model = kind()
    inject_lora(model, LoraConfig(r=2), seed=0)
    with torch.inference_mode():
        x = torch.randn(3, 4)
        changed = x * 2 if kind is Changing else x.relu()
        expected = _by_itself(model.q, x) + _by_itself(model.k, changed) + (0 if kind is Changing else changed)
        torch.testing.assert_close(model(x.clone()), expected)


CHANGES = {
    "weight": lambda model: model.k.weight.detach().mul_(3),
    "A": lambda model: model.k.lora_A.detach().mul_(3),
    "B": lambda model: model.k.lora_B.detach().mul_(3),
    "train": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_between_the_calls(change):
    model, x = _two(lora_dropout=0.5).train(), torch.randn(30, 4)
    model.q(x)
    CHANGES[change](model)
    model.eval()
    torch.testing.assert_close(model.k(x), _by_itself(model.k, x))


def test_what_was_computed_without_gradients_is_not_given_to_one_who_wants_them():
    model, x = _two(), torch.randn(3, 4)
    with torch.no_grad():
        model.q(x)
    assert model.k(x).requires_grad


def test_what_another_thread_waits_for_is_left_to_it():
    model, x = _two(), torch.randn(3, 4)
    thread = threading.Thread(target=model.q, args=(x,))
    thread.start()
    thread.join()
    waiting = model.q.lora_group._waiting
    torch.testing.assert_close(model.k(x), _by_itself(model.k, x))
    assert model.q.lora_group._waiting is waiting
    assert waiting is not None


def test_nothing_is_handed_out_that_a_call_before_the_last_one_left_behind():
    model, x = _two(), torch.randn(3, 4)
    model.q(x)
    model.k.lora_dropout = 0.5  # so that both compute for themselves
    model.q(x)
    assert model.q.lora_group._waiting is None


def test_a_copy_of_one_layer_alone_computes_for_itself():
    model, x = _two(), torch.randn(3, 4)
    for q in (copy.deepcopy(model.q), pickle.loads(pickle.dumps(model.q))):
        torch.testing.assert_close(q(x), _by_itself(model.q, x))
        assert q.lora_group._waiting is None


def test_a_layer_is_traced_by_itself():
    model, x = _two().eval(), torch.randn(3, 4)
    traced = torch.jit.trace(model.q, x)
    torch.testing.assert_close(traced(x), model.q(x))


def test_compiles_whole():
    torch._dynamo.reset()
    model, x = _two(), torch.randn(3, 4)
    model.q(x)  # something waits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
