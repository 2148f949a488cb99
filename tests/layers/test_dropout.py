"""Which elements dropout leaves out: how many, independently of each other, and the same again for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.layers.dropout import add_product, draw, without


def _kept(shape, p, dtype=torch.float32):
    return without(torch.ones(shape, dtype=dtype), draw(torch.ones(shape, dtype=dtype), p), p)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.125, 0.3, 0.5, 0.9])
def test_each_element_is_dropped_with_the_stated_probability_independently_of_others(p):
    torch.manual_seed(0)
    kept = _kept((4000, 250), p, torch.float64)
    share = 1 - p
    spread = (share * p / kept.numel()) ** 0.5
    assert kept.mean().item() == pytest.approx(share, abs=5 * spread + 2**-16)
    flat = kept.flatten()
    for step in (1, 2, 3, 4, 250):  # neighbours, which may share a draw, and columns
        together = (flat[:-step] * flat[step:]).mean().item()
        assert together == pytest.approx(share**2, abs=5 * spread + 2**-15)
    # Of a binomial variable, the variance over columns is known too.
    assert kept.mean(0).var().item() == pytest.approx(share * p / 4000, rel=0.5)


@pytest.mark.parametrize("p", [1e-300, 1e-20, 1e-8, 0.995, 1 - 1e-6, 1 - 1e-12])
def test_next_to_nothing_or_nearly_all_is_dropped(p):
    torch.manual_seed(0)
    kept = _kept((1000, 1000), p, torch.float64)
    assert kept.sum().item() == pytest.approx(1e6 * (1 - p), abs=5 * (1e6 * p * (1 - p)) ** 0.5 + 0.5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 2**32))
def test_places_are_within_the_input_and_the_same_for_the_same_seed(rows, columns, p, seed):
    x = torch.randn(rows, columns)
    torch.manual_seed(seed)
    first = draw(x, p)
    torch.manual_seed(seed)
    assert torch.equal(first, draw(x, p))
    if first.dtype != torch.bool:
        assert (first.diff() > 0).all()
        assert ((first >= 0) & (first < x.numel())).all()
    kept = without(x, first, p)
    assert kept.shape == x.shape
    assert ((kept == x) | (kept == 0)).all()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_a_product_is_added_where_nothing_was_dropped(p):
    torch.manual_seed(0)
    dx, g, a = torch.randn(20, 8), torch.randn(20, 3), torch.randn(3, 8)
    dropped = draw(dx, p) if p else None
    kept = torch.ones(20, 8) if dropped is None else without(torch.ones(20, 8), dropped, p)
    expected = dx + kept * (g @ a)
    add_product(dx, g, a, dropped, p)
    torch.testing.assert_close(dx, expected)


def test_an_input_that_is_no_whole_block_of_memory_loses_the_right_elements():
    x = torch.randn(40, 16).t()[:, ::2]
    dropped = draw(x, 0.1)
    kept = without(x, dropped, 0.1)
    expected = x.reshape(-1).clone()
    expected[dropped] = 0
    assert torch.equal(kept, expected.view(16, 20))


@pytest.mark.parametrize("rows", [4, 1200])  # so much that it is done in another way
def test_what_is_drawn_as_places_is_zero_and_nothing_else(rows):
    x = torch.randn(rows, 1000)
    torch.manual_seed(0)
    places = draw(x, 0.05)
    expected = x.clone()
    expected.view(-1)[places] = 0
    assert torch.equal(without(x, places, 0.05), expected)
    assert 0 < (expected == 0).sum() == len(places)
