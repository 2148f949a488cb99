"""Optimizer states by name, against the optimizer that goes on without interruption."""

import copy
import functools

import pytest
import torch
from torch import nn

from lora_lightning import AdapterError
from lora_lightning.strategies.optimizer_state import in_order, load_named_states, named_state


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _groups(model, *orders):
    named = dict(model.named_parameters())
    return [{"params": [named[name] for name in order], "lr": 0.1 / (i + 1)} for i, order in enumerate(orders)]


A, B, C, D = "0.weight", "0.bias", "2.weight", "2.bias"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("order", [([A, B], [C, D]), ([B, A], [D, C])])
def test_going_on_in_another_order_is_going_on(kind, order):
    x = torch.randn(5, 3)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    whole = _model()
    optimizer = kind(_groups(whole, [A, B], [C, D]), **options)
    _step(whole, optimizer, x)
    values, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(named_state(optimizer, whole))
    _step(whole, optimizer, x)

    other = _model()
    other.load_state_dict(values)
    resumed = kind(_groups(other, *order), **options)
    load_named_states([resumed], [state], other)
    _step(other, resumed, x)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True))


def test_learning_rates_of_groups_come_back():
    model = _model()
    optimizer = torch.optim.SGD(_groups(model, [A, B], [C, D]))
    optimizer.param_groups[1]["lr"] = 0.007
    fresh = torch.optim.SGD(_groups(model, [A, B], [C, D]))
    load_named_states([fresh], [named_state(optimizer, model)], model)
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.007]


@pytest.mark.parametrize("orders", [([C, D], [B, A]), ([], [C, D], [A, B]), ([D, C], [], [A, B])])
def test_groups_in_another_order_keep_their_learning_rates(orders):
    model = _model()
    saved = named_state(torch.optim.SGD(_groups(model, [A, B], [C, D])), model)
    resumed = torch.optim.SGD([{**group, "lr": 9.0} for group in _groups(model, *orders)])
    load_named_states([resumed], [saved], model)
    rates = {A: 0.1, B: 0.1, C: 0.05, D: 0.05}
    for group, order in zip(resumed.param_groups, orders, strict=True):
        # One that the checkpoint does not have, which some engines drop, stays as it is.
        assert group["lr"] == (rates[order[0]] if order else 9.0)


@pytest.mark.parametrize("order", [([A, B], [C, D]), ([C, D], [A, B])])
def test_schedulers_follow_the_groups(order):
    def scheduled(model, *orders):
        factors = {A: 0.9, C: 0.5}
        groups = [{**g, "lr": {A: 0.1, C: 0.01}[o[0]]} for g, o in zip(_groups(model, *orders), orders, strict=True)]
        optimizer = torch.optim.SGD(groups)
        functions = [functools.partial(pow, factors[order[0]]) for order in orders]
        first = torch.optim.lr_scheduler.LambdaLR(optimizer, functions)
        second = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [4])

    model = _model()
    optimizer, scheduler = scheduled(model, [A, B], [C, D])
    resumed, again = scheduled(model, *order)
    for _ in range(2):
        _tick(scheduler)
    state, ticks = copy.deepcopy((named_state(optimizer, model), scheduler.state_dict()))
    for _ in range(4):
        _tick(scheduler)
    (found,) = load_named_states([resumed], [state], model)
    again.load_state_dict(in_order(ticks, found))
    for _ in range(4):
        _tick(again)
    wanted = dict(zip((A, C), scheduler.get_last_lr(), strict=True))
    assert again.get_last_lr() == pytest.approx([wanted[names[0]] for names in order])


def _tick(scheduler):
    scheduler.optimizer.step()
    scheduler.step()


def test_how_an_optimizer_steps_is_this_runs():
    """A checkpoint of a run on a GPU is read on a CPU."""
    model = _model()
    saved = named_state(torch.optim.AdamW(model.parameters(), weight_decay=0.3), model)
    saved["param_groups"][0] |= {"fused": True, "capturable": True, "foreach": False}
    optimizer = torch.optim.AdamW(model.parameters())
    load_named_states([optimizer], [saved], model)
    group = optimizer.param_groups[0]
    assert (group["fused"], group["capturable"], group["foreach"], group["weight_decay"]) == (None, False, None, 0.3)


def test_groups_without_parameters_go_by_their_order():
    model = _model()
    saved = named_state(torch.optim.SGD(_groups(model, [], [A, B], [], [C, D])), model)
    resumed = torch.optim.SGD([{**group, "lr": 9.0} for group in _groups(model, [C, D], [], [], [A, B])])
    load_named_states([resumed], [saved], model)
    assert [group["lr"] for group in resumed.param_groups] == [0.1 / 4, 0.1, 0.1 / 3, 0.1 / 2]


@pytest.mark.parametrize("orders", [([A, C], [B, D]), ([A], [B, C, D]), ([A, B, C, D], []), ([A, B], [C], [D])])
def test_parameters_in_other_groups_are_refused(orders):
    model = _model()
    saved = named_state(torch.optim.SGD(_groups(model, [A, B], [C, D])), model)
    resumed = torch.optim.SGD([{**group, "lr": 9.0} for group in _groups(model, *orders)])
    with pytest.raises(AdapterError, match="no group of the checkpoint has the parameters of this run's with"):
        load_named_states([resumed], [saved], model)
    assert all(group["lr"] == 9.0 for group in resumed.param_groups)


def test_what_does_not_fit_is_told_by_name():
    model = _model()
    state = named_state(torch.optim.SGD(_groups(model, [A, B], [C, D])), model)
    with pytest.raises(AdapterError, match=r"holds other parameters than this run's: 2\.bias"):
        load_named_states([torch.optim.SGD(_groups(model, [A, B], [C]))], [state], model)
    with pytest.raises(AdapterError, match="2 parameter groups, this run's has 1"):
        load_named_states([torch.optim.SGD(_groups(model, [A, B, C, D]))], [state], model)
    with pytest.raises(AdapterError, match="states of 1 optimizers, this run has 2"):
        load_named_states([torch.optim.SGD(model.parameters())] * 2, [state], model)
