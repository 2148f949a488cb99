"""Learning-rate schedules against those of transformers."""

import copy

import pytest
import torch
from transformers import optimization

from lora_lightning.tasks import schedule


def rates(scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def adam():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


@pytest.mark.parametrize(("steps", "warmup", "rising"), [(40, 0.1, 4), (40, 0.001, 1), (7, 0.0, 0), (1, 0.5, 1)])
def test_rates_are_those_of_transformers(steps, warmup, rising):
    expected = {
        schedule.warmup_cosine: lambda given: optimization.get_cosine_with_min_lr_schedule_with_warmup(
            given, rising, steps, min_lr_rate=0.1
        ),
        schedule.warmup_linear: lambda given: optimization.get_linear_schedule_with_warmup(given, rising, steps),
        schedule.warmup_constant: lambda given: optimization.get_constant_schedule_with_warmup(given, rising),
    }
    all_of_them = steps + (3 if rising < steps else 0)  # past the end too, where there is anything to fall over
    for ours, theirs in expected.items():
        found = rates(ours(adam(), steps, warmup), all_of_them)
        assert found == pytest.approx(rates(theirs(adam()), all_of_them), abs=1e-12), ours.__name__
    assert rates(schedule.constant(adam()), 3) == [0.3] * 3


def test_a_state_goes_on_and_one_of_transformers_too():
    for make in (
        lambda: schedule.warmup_cosine(adam(), 20, 0.2),
        lambda: optimization.get_cosine_with_min_lr_schedule_with_warmup(adam(), 4, 20, min_lr_rate=0.1),
    ):
        begun = make()
        expected = rates(begun, 20)[7:]
        half = make()
        rates(half, 7)
        resumed = schedule.warmup_cosine(adam(), 20, 0.2)
        resumed.load_state_dict(copy.deepcopy(half.state_dict()))
        resumed.optimizer.load_state_dict(half.optimizer.state_dict())
        assert rates(resumed, 13) == pytest.approx(expected, abs=1e-12)
