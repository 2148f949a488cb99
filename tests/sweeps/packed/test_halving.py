from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning import LoraConfigError
from lora_lightning.sweeps.packed.halving import Board, Place, Plan


@pytest.mark.parametrize(
    ("setting", "plan"),
    [
        (None, None),
        (False, None),
        (True, Plan(2, 0.25)),
        ({"eta": 3}, Plan(3, 0.25)),
        ({"eta": 4, "first": 0.125}, Plan(4, 0.125)),
        ({"first": None}, Plan()),
    ],
)
def test_what_the_setting_says(setting, plan):
    assert Plan.of(setting) == plan


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("yes", "must be true, false, or the keys eta and first, got 'yes'"),
        ({"etta": 3}, r"got 'etta' \(did you mean eta\?\)"),
        ({"eta": 1}, "at least 2, got 1"),
        ({"eta": 2.5}, "a whole number of at least 2, got 2.5"),
        ({"first": 5}, "a share of the steps, as 0.25, got 5"),
        ({"first": True}, "a share of the steps"),
    ],
)
def test_a_wrong_setting_is_refused(setting, message):
    with pytest.raises(LoraConfigError, match=message):
        Plan.of(setting)


@given(st.integers(1, 10**6), st.integers(2, 5), st.floats(0.001, 0.9))
def test_rungs_lie_within_the_run_and_are_climbed_once_each(steps, eta, first):
    rungs = Plan(eta, first).rungs(steps)
    assert rungs == sorted(set(rungs))
    assert all(1 < rung < steps for rung in rungs)


@pytest.mark.parametrize(("steps", "rungs"), [(1, []), (3, []), (8, [2, 4]), (30, [7, 15]), (1000, [250, 500])])
def test_rungs_at_a_quarter_and_a_half(steps, rungs):
    assert Plan().rungs(steps) == rungs


values = st.lists(st.one_of(st.floats(0, 9), st.just(math.nan), st.sampled_from([1.0, 2.0])), min_size=1, max_size=20)


@given(values, st.integers(2, 4), st.sampled_from(["min", "max"]), st.randoms())
def test_the_best_part_stays_whatever_the_order_of_reports(reported, eta, mode, chance):
    board, order = Board(eta, mode), list(range(len(reported)))
    chance.shuffle(order)
    for number in order:
        board.report(0, number, reported[number])
    places = {number: board.place(0, number) for number in order}
    assert sorted(place.place for place in places.values()) == list(range(1, len(reported) + 1))
    stay = [number for number in order if places[number].stays]
    assert len(stay) == math.ceil(len(reported) / eta)
    sign = 1 if mode == "min" else -1

    def badness(number):
        return (math.inf if math.isnan(reported[number]) else sign * reported[number], number)

    assert sorted(stay) == sorted(sorted(order, key=badness)[: len(stay)])


def test_whoever_comes_later_is_compared_with_all_before():
    board = Board(2, "min")
    for number, value in enumerate([1.0, 2.0, 3.0, 4.0]):
        board.report(0, number, value)
    assert [board.place(0, number).stays for number in range(4)] == [True, True, False, False]
    board.report(0, 4, 3.5)
    assert board.place(0, 4) == Place(4, 5, False)
    board.report(0, 5, 0.5)
    assert board.place(0, 5) == Place(1, 6, True)


def test_what_was_reported_before_the_sweep_was_started_again_counts():
    board = Board(2, "max", {7: [0.9, 0.8], 8: [0.1]})
    board.report(0, 1, 0.5)
    assert board.place(0, 1) == Place(2, 3, True)
    board.report(1, 1, 0.5)
    assert board.place(1, 1) == Place(2, 2, False)
