import os
import random
import subprocess
import sys
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.samplers import MEGABATCH, LengthGroupedSampler, ShardSampler, split_rows

sizes = st.integers(1, 70)
worlds = st.integers(1, 5)
batches = st.integers(1, 4)


def shards(size, world, batch_size, *, seed=0, epoch=0, lengths="some"):
    if lengths == "some":
        lengths = [n * 7 % 23 + 1 for n in range(size)]
    found = []
    for rank in range(world):
        sampler = LengthGroupedSampler(lengths, size, batch_size=batch_size, seed=seed, rank=rank, world=world)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@settings(max_examples=80, deadline=None)
@given(sizes, worlds, batches, st.integers(0, 3), st.sampled_from(["some", None]))
def test_every_row_comes_once_up_to_padding(size, world, batch_size, epoch, lengths):
    found = shards(size, world, batch_size, epoch=epoch, lengths=lengths)
    assert len({len(shard) for shard in found}) == 1
    count = Counter(row for shard in found for row in shard)
    assert set(count) == set(range(size))
    assert sum(count.values()) - size < world


def test_the_order_belongs_to_seed_and_epoch_and_not_to_global_randomness():
    first = shards(50, 2, 4)
    random.seed(3)
    assert shards(50, 2, 4) == first
    assert shards(50, 2, 4, epoch=1) != first
    assert shards(50, 2, 4, seed=1) != first
    assert shards(50, 2, 4, seed=1) != shards(50, 2, 4, epoch=1)


def test_two_ranks_together_see_the_batches_of_one():
    [whole] = shards(48, 1, 8)
    one, two = shards(48, 2, 4)
    for step in range(6):
        together = one[4 * step : 4 * step + 4] + two[4 * step : 4 * step + 4]
        assert sorted(together) == sorted(whole[8 * step : 8 * step + 8])


def test_batches_hold_rows_of_like_length_and_the_longest_come_first():
    lengths = random.Random(0).choices(range(10, 500), k=4 * MEGABATCH + 3)
    [grouped] = shards(len(lengths), 1, 4, lengths=lengths)

    def padding(order):
        return sum(
            4 * max(b) - sum(b) for b in ([lengths[r] for r in order[n : n + 4]] for n in range(0, len(order), 4))
        )

    assert padding(grouped) < padding(range(len(lengths))) / 5
    for start in range(0, len(grouped), 4):  # the incomplete batch is the last, or it would shift all behind it
        batch = [lengths[row] for row in grouped[start : start + 4]]
        assert batch == sorted(batch, reverse=True)
    assert max(lengths) in [lengths[row] for row in grouped[:4]]
    steps = [lengths[row] for row in grouped[::4]]
    assert steps != sorted(steps, reverse=True)


@given(sizes, worlds)
def test_validation_counts_no_row_twice_and_keeps_ranks_in_step(size, world):
    found = [list(ShardSampler(size, rank=rank, world=world)) for rank in range(world)]
    assert len({len(shard) for shard in found}) == 1
    everything = sorted(row for shard in found for row in shard)
    assert everything[:size] == list(range(size))
    assert all(row >= size for row in everything[size:])  # fillers


contents = st.lists(st.text("abc", min_size=1, max_size=2), min_size=2, max_size=40)


@given(contents, st.integers(0, 20), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_split_is_disjoint_and_follows_the_content(rows, held_out, seed, chance):
    train, held = split_rows(rows, held_out, seed)
    assert sorted(train + held) == list(range(len(rows)))
    assert len(held) <= held_out
    assert not {rows[n] for n in train} & {rows[n] for n in held}
    shuffled = rows.copy()
    chance.shuffle(shuffled)
    assert {shuffled[n] for n in split_rows(shuffled, held_out, seed)[1]} == {rows[n] for n in held}


def test_the_split_is_as_large_as_asked_and_moves_with_the_seed():
    rows = [str(n) for n in range(200)]
    assert len(split_rows(rows, 30, 0)[1]) == 30
    assert set(split_rows(rows, 30, 0)[1]) != set(split_rows(rows, 30, 1)[1])


def test_order_is_the_same_in_another_process():
    code = (
        "from lora_lightning.data.samplers import *;"
        "print(list(LengthGroupedSampler(None, 9, batch_size=2, seed=5)), split_rows(list('abcdefg'), 3, 5))"
    )
    made = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": h, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for h in ("1", "2")
    }
    expected = f"{list(LengthGroupedSampler(None, 9, batch_size=2, seed=5))} {split_rows(list('abcdefg'), 3, 5)}\n"
    assert made == {expected.encode()}
