"""Contenders are comparable: same adapters, right gradients, and a check that can fail."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from benchmarks import contenders as c
from benchmarks.check import difference, reference_gradients
from benchmarks.shapes import HEADLINES, SHAPES, WHOLE_STORIES, build_model, chat_batches, full_batch, tokens_in, twin
from benchmarks.workers import Worker

BATCH = full_batch(384, 2, 12, supervised=0.5)


@pytest.mark.parametrize("spec", [c.OURS, c.PEFT_SHIPPED, c.PEFT_TUNED], ids=["ours", "shipped", "tuned"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_float64(spec, dora):
    spec = replace(spec, dora=dora, r=4)
    if reason := c.why_not(spec):
        pytest.skip(reason)
    base = build_model(SHAPES["tiny"])
    one = c.Contender(spec, twin(base))
    wanted = reference_gradients(base, one.adapters(), BATCH)
    assert len(wanted) == 14 * (3 if dora else 2)
    assert difference(one.gradients(BATCH), wanted) < 1e-5


def test_a_wrong_gradient_and_a_missing_one_are_found():
    base = build_model(SHAPES["tiny"])
    one = c.Contender(replace(c.OURS, r=4), twin(base))
    wanted = reference_gradients(base, one.adapters(), BATCH)
    got = one.gradients(BATCH)
    name = next(iter(got))
    assert difference(got | {name: got[name] * 1.01}, wanted) == pytest.approx(0.01, rel=1e-2)
    del got[name]
    with pytest.raises(RuntimeError, match=name):
        difference(got, wanted)


def test_all_contenders_have_the_same_adapters_and_none_is_zero():
    base = build_model(SHAPES["tiny"])
    ours, peft = (c.Contender(replace(spec, r=4), twin(base)).adapters() for spec in (c.OURS, c.PEFT_SHIPPED))
    assert ours.keys() == peft.keys()
    for name, parts in ours.items():
        for part, value in parts.items():
            assert value.count_nonzero() == value.numel()
            torch.testing.assert_close(value, peft[name][part], rtol=0, atol=0)


def test_twins_share_every_weight_and_no_module():
    base = build_model(SHAPES["tiny"])
    other = twin(base)
    assert [p.data_ptr() for p in base.parameters()] == [p.data_ptr() for p in other.parameters()]
    assert not {id(m) for m in base.modules()} & {id(m) for m in other.modules()}


def test_floor_trains_nothing_but_reaches_down_to_the_first_layer():
    floor = c.Contender(c.FLOOR, build_model(SHAPES["tiny"]))
    assert [p.shape for p in floor.trained] == [(64,)]
    floor.loss(BATCH).backward()
    assert floor.model.below_all.grad.abs().sum() > 0


def test_ladder_changes_one_thing_a_level():
    levels = list(c.LADDER.values())
    assert levels[0] == c.PEFT_SHIPPED
    assert levels[-1] == c.OURS_ON_CPU
    for before, after in pairwise(levels):
        changed = {f.name for f in fields(c.Spec) if getattr(before, f.name) != getattr(after, f.name)}
        assert len(changed - {"base_dtype"}) == 1, changed  # whose adapters they are decides on their dtype as well


@pytest.mark.parametrize(("chats", "share"), [(HEADLINES, 0.073), (WHOLE_STORIES, 0.018)])
def test_rows_are_as_long_and_as_little_supervised_as_the_stories(chats, share):
    batches = chat_batches(384, 4, 32, chats, grouped=False)
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert supervised / sum(map(tokens_in, batches)) == pytest.approx(share, rel=0.15)


def test_batches_by_length_hold_the_same_rows_with_less_padding():
    mixed, grouped = (chat_batches(384, 4, 32, WHOLE_STORIES, grouped=kind) for kind in (False, True))
    assert sum(map(tokens_in, mixed)) == sum(map(tokens_in, grouped))
    padding = [sum(batch["input_ids"].numel() for batch in batches) for batches in (mixed, grouped)]
    assert padding[1] < 0.85 * padding[0]
    few = chat_batches(384, 4, 8, WHOLE_STORIES, grouped=True)
    assert sum(map(tokens_in, few)) / 8 == pytest.approx(sum(map(tokens_in, grouped)) / 32, rel=0.1)


def test_switches_are_on_in_a_worker_and_lightning_is_not_there():
    worker = Worker(Switched)
    try:
        assert worker.call("lightning") is False
    finally:
        worker.close()


class Switched:
    """A contender with all that our callback sets for a process."""

    def __init__(self) -> None:
        self.one = c.Contender(c.OURS_ON_CPU, build_model(SHAPES["tiny"]))

    def lightning(self) -> bool:
        self.one.step(BATCH)
        return any(name.split(".")[0] == "lightning" for name in sys.modules)
