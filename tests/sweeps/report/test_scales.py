import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.sweeps.report.scales import limits, scale_of

FINITE = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("lora.r", [4, 8, 64], "log2"),
        ("optimizer.lr", [1e-4, 3e-4], "log10"),
        ("learning_rate", [1e-4, 3e-4], "log10"),
        ("learning_rate", [0.0, 3e-4], "linear"),  # nought has no place on a logarithmic axis
        ("optimizer.weight_decay", [1e-5, 1e-4, 1e-1], "log10"),
        ("lora.lora_dropout", [0.001, 0.03, 0.05, 0.09], "linear"),
        ("lora.use_rslora", [True, False], "words"),
        ("lora.target_modules", ["all-linear", "[q_proj]"], "words"),
        ("data.max_length", [None, 128], "words"),
        ("learning_rate", [math.inf, 1.0], "words"),
    ],
)
def test_the_axis_that_suits(key, values, kind):
    assert scale_of(key, values).kind == kind


def test_places_are_doublings_and_powers():
    rank, rate = scale_of("lora.r", [64, 4, 8]), scale_of("lr", [1e-4, 1e-2])
    assert [rank.place(value) for value in rank.values] == [2, 3, 6]
    assert [rate.place(value) for value in rate.values] == pytest.approx([-4, -2])
    assert rank.ticks == [(2, "4"), (3, "8"), (6, "64")]


@given(st.sampled_from(["lora.r", "lr", "dropout"]), st.lists(st.floats(1e-6, 1e6), min_size=1, unique=True))
def test_ticks_are_few_in_order_and_within_the_values(key, values):
    scale = scale_of(key, values)
    places = [place for place, _ in scale.ticks]
    assert len(places) <= 10
    assert places == sorted(places)
    low, high = (scale.place(scale.values[index]) for index in (0, -1))
    slack = 1e-6 * max(1.0, abs(high - low))
    assert all(low - slack <= place <= high + slack for place in places)


def test_of_many_words_some_are_written():
    scale = scale_of("name", [f"a{n:02}" for n in range(50)])
    assert [text for _, text in scale.ticks] == [f"a{n:02}" for n in (0, 5, 11, 16, 22, 27, 33, 38, 44, 49)]
    assert scale.place("a49") == 49


@given(st.lists(FINITE, min_size=1))
def test_limits_hold_the_better_half_and_turn_with_the_mode(values):
    low, high = limits(values, "min")
    assert low < high
    better = sorted(values)[: (len(values) + 1) // 2]
    assert all(low <= value <= high for value in better)
    assert limits([-value for value in values], "max") == (-high, -low)


def test_a_diverged_job_does_not_flatten_the_others():
    low, high = limits([2.3, 2.4, 2.5, 2.6, 1e5], "min")
    assert 2.2 < low < 2.3
    assert 2.6 < high < 2.7
    assert limits([2.3, 2.4, 2.5, 3.2], "min")[1] > 3.2
