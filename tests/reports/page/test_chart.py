"""The geometry of charts, against what it was made from."""

import json
import math
import random
import re

import pytest

from lora_lightning.reports.page.chart import Line, chart, thinned, ticks, written


def points_of(d):
    return [tuple(map(float, pair.split())) for pair in re.sub("^M|h0$", "", d).split("L")]


def test_points_stand_where_their_values_are():
    points = [(0, 4.0), (10, 3.0), (40, 2.0)]
    drawn = chart("Loss", [Line("validation", "validated", points, dots=True)])
    low, high = json.loads(drawn.values)["y"]
    assert low <= 2.0
    assert high >= 4.0
    expected = [(1000 * step / 40, 1000 * (high - value) / (high - low)) for step, value in points]
    line, *dots = drawn.paths
    for found, wanted in zip(points_of(line.d), expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.06)
    assert [points_of(dot.d)[0] for dot in dots] == points_of(line.d)
    assert [(mark.left, mark.text) for mark in drawn.labels] == [(0.0, "4.00"), (100.0, "2.00")]
    assert drawn.summary == "validation from 4.00 at step 0 to 2.00 at step 40"


def test_what_is_not_finite_is_left_out():
    drawn = chart("Loss", [Line("a", "plain", [(0, math.nan), (1, 2.0), (2, math.inf), (3, 1.0)])])
    assert len(points_of(drawn.paths[0].d)) == 2
    assert chart("Loss", [Line("a", "plain", [(0, math.nan)]), Line("b", "plain", [])]) is None


@pytest.mark.parametrize("points", [[(5, 2.0)], [(1, 3.0), (2, 3.0)], [(1, 0.0), (9, 0.0)], [(1, -1e9), (2, 1e9)]])
def test_lines_without_height_or_width(points):
    drawn = chart("Loss", [Line("a", "plain", points, dots=True, smooth=True)])
    assert all(0 <= part <= 1000 for path in drawn.paths for pair in points_of(path.d) for part in pair)
    assert len({mark.text for mark in drawn.y}) == len(drawn.y)


def test_ticks_are_round_apart_and_around():
    draw = random.Random(0)
    for _ in range(200):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-5, 5)
        high = low + 10 ** draw.uniform(-5, 5)
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-6 * (high - low)
        assert found[-1] >= high - 1e-6 * (high - low)
        assert 2 <= len(found) <= 8
        assert [float(text.replace(",", "")) for text in written(found)] == pytest.approx(found, rel=1e-5, abs=1e-12)


def test_many_points_become_few_and_keep_their_ends():
    points = [(step, math.sin(step / 50)) for step in range(10_000)]
    few = thinned(points, 300)
    assert len(few) <= 300
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert all(abs(value - math.sin(step / 50)) < 0.4 for step, value in few)
    assert len(chart("Loss", [Line("a", "trained", points, smooth=True)]).values) < 8000
