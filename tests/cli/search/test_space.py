from __future__ import annotations

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.cli.search.space import Choices, Numbers, parse_space, written
from lora_lightning.errors import LoraConfigError


def value_of(text):
    [override] = OverridesParser.create().parse_overrides([f"key={text}"])
    return override.value()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4,8,16", Choices(("4", "8", "16"))),
        ("choice(4,8)", Choices(("4", "8"))),
        ("4,8,4", Choices(("4", "8"))),
        ("a,null,[x,y],{b:1},'two words'", Choices(("a", "null", "[x,y]", "{b:1}", "'two words'"))),
        ("true,1,1.0", Choices(("True", "1", "1.0"))),
        ("interval(0,0.1)", Numbers(0, 0.1)),
        ("interval(1,10)", Numbers(1, 10)),  # Hydra has made floats of them
        ("int(interval(1,10))", Numbers(1, 10, whole=True)),
        ("interval(-2.5,-1)", Numbers(-2.5, -1)),
        ("tag(log,interval(1e-4,1e-2))", Numbers(1e-4, 1e-2, log=True)),
        ("tag(log,int(interval(1,64)))", Numbers(1, 64, log=True, whole=True)),
        ("int(interval(1,3.7))", Numbers(1, 3, whole=True)),
        ("float(interval(1,3))", Numbers(1, 3)),
        ("range(1,4)", Numbers(1, 3, step=1, whole=True)),  # without its end, as in a grid
        ("range(1,9,3)", Numbers(1, 7, step=3, whole=True)),
        ("range(9,1,-3)", Numbers(3, 9, step=3, whole=True)),
        ("range(0,1,0.25)", Numbers(0, 0.75, step=0.25)),
        ("tag(log,range(1,65))", Numbers(1, 64, log=True, whole=True)),
        ("shuffle(1,2)", Choices(("1", "2"))),
    ],
)
def test_what_is_searched(text, expected):
    space = parse_space([f"lora.r={text}"])
    assert space.searched == {"lora.r": expected}
    assert space.fixed == ()


@pytest.mark.parametrize(
    "line", ["lora.r=4", "lora.r=[4,8]", "name='a,b'", "+new=1", "~scheduler", "model@other=x", "a="]
)
def test_what_has_one_value_stays_as_it_was_typed(line):
    assert parse_space([line]) == ((line,), {})


def test_what_is_typed_comes_before_the_file():
    space = parse_space(
        ["lora.r=8", "+new=1,2", "optimizer.lr=interval(0.1,0.2)"],
        {"lora.r": [4, 8], "new": 3, "optimizer.lr": 0.5, "lora.target_modules": ["all-linear", ["q_proj", "v_proj"]]},
    )
    assert space.fixed == ("lora.r=8",)
    assert list(space.searched) == ["lora.target_modules", "+new", "optimizer.lr"]
    assert space.searched["lora.target_modules"] == Choices(("all-linear", "[q_proj,v_proj]"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("interval(3,1)", "got 3 before 1"),
        ("tag(log,interval(0,1))", "above zero, got 0"),
        ("tag(log,range(0,4))", "above zero, got 0"),
        ("tag(log,range(1,9,2))", "steps of 1"),
        ("tag(sweet,interval(1,2))", "no tag sweet; log is the only one"),
        ("tag(log,choice(1,2))", "log is for numbers"),
        ("range(5,1)", "from 5 to below 1 by 1"),
        ("range(1,5,0)", "by 0"),
        ("interval(inf,1)", "two numbers, got inf"),
        ("choice()", "empty choice"),
        ("[1", "key=[1"),
    ],
)
def test_what_cannot_be_searched_is_named_with_the_reason(text, words):
    with pytest.raises(LoraConfigError) as error:
        parse_space([f"key={text}"])
    assert words in str(error.value)
    assert f"key={text}" in str(error.value)


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(LoraConfigError) as error:
        parse_space(["a=interval(3,1)", "b=1,2", "c=range(5,1)"])
    assert str(error.value).count("\n  - ") == 2


numbers = st.one_of(st.integers(-1000, 1000), st.floats(-1e6, 1e6, allow_subnormal=False))


@given(st.lists(numbers, min_size=2, max_size=2, unique=True).map(sorted), st.floats(0, 1))
def test_a_number_between_is_read_by_hydra_as_it_was_drawn(ends, share):
    low, high = ends
    cast = "int" if isinstance(low, int) and isinstance(high, int) else "float"
    [values] = parse_space([f"key={cast}(interval({low!r},{high!r}))"]).searched.values()
    value = min(values.low + share * (values.high - values.low), values.high)
    read = value_of(values.write(int(value) if values.whole else value))
    assert read == (int(value) if values.whole else value)
    assert isinstance(read, int) is values.whole


@given(st.integers(-20, 20), st.integers(1, 30), st.integers(1, 7))
def test_a_range_has_the_values_of_a_grid(start, length, step):
    [values] = parse_space([f"key=range({start},{start + length},{step})"]).searched.values()
    assert values.all() == tuple(range(start, start + length, step))
    assert [value_of(values.write(each)) for each in values.all()] == list(values.all())


def test_steps_of_a_tenth_stay_tenths():
    [values] = parse_space(["key=range(0,1,0.1)"]).searched.values()
    assert [values.write(each) for each in values.all()] == [repr(n / 10) for n in range(10)]


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text("ab .*|'\\\"$(),:[]{}=1"),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(plain)
def test_a_value_of_a_file_is_read_by_hydra_as_it_was(value):
    assert value_of(written(value)) == value


@given(st.lists(plain, min_size=2, max_size=4))
def test_a_list_of_a_file_is_a_choice_between_its_items(values):
    [choices] = parse_space((), {"key": values}).searched.values()
    read = [value_of(text) for text in choices.texts]
    assert all(each in read for each in values)
    assert math.isclose(len(read), len({repr(each) for each in values}), abs_tol=0)
