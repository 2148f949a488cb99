import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.sweeps.manifest import shortest
from lora_lightning.sweeps.report.values import order, settings_of, shown, typed

KEYS = st.from_regex(r"[a-z]{1,3}(\.[a-z]{1,3}){0,2}", fullmatch=True)


@given(st.integers() | st.floats())
def test_numbers_are_read_as_what_they_were(value):
    back = typed(repr(value))
    assert type(back) is type(value)
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(("text", "value"), [("null", None), ("true", True), ("False", False), ("1e-3", 0.001)])
def test_words_of_hydra(text, value):
    assert typed(text) is value or typed(text) == value


@pytest.mark.parametrize(
    "text", ["all-linear", "[q_proj,v_proj]", "{a: 1}", "1e", "8 rows", "", "'", "nullable", "'unclosed", "${seed}"]
)
def test_what_is_no_number_stays_text(text):
    assert typed(text) == text


def test_quotes_are_no_part_of_a_value():
    assert settings_of(["a='x=1, y'", 'b="8"', r"c='it\'s'"]) == {"a": "x=1, y", "b": "8", "c": "it's"}


def test_of_a_key_set_twice_the_later_counts():
    assert settings_of(["lora.r=8", "++lora.r=16"]) == {"lora.r": 16}


@given(st.lists(KEYS, unique=True, max_size=8))
@settings(max_examples=50)
def test_short_keys_are_endings_that_tell_keys_apart(keys):
    short = {key: shortest(key, keys) for key in keys}
    assert len(set(short.values())) == len(keys)
    for key, ending in short.items():
        assert key == ending or key.endswith(f".{ending}")


@given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text()), max_size=8))
def test_values_of_any_kinds_have_an_order(values):
    ordered = sorted(values, key=order)
    numbers = [each for each in ordered if order(each)[0] == 0]
    assert numbers == sorted(numbers)
    assert ordered[: len(numbers)] == numbers


@given(st.floats(1e-300, 1e300) | st.integers())
def test_what_is_shown_is_near_what_it_is(value):
    assert float(shown(value)) == pytest.approx(value, rel=1e-4)
    assert float(shown(value, zeros=True)) == pytest.approx(value, rel=1e-4)


def test_numbers_below_each_other_are_equally_exact():
    assert [shown(value, zeros=True) for value in (2.5, 2.34567, 1e5, 1.5e-7, 0.0)] == [
        *("2.5000", "2.3457", "1.0000e5", "1.5000e-7", "0.0000")
    ]
