import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data import TextData
from lora_lightning.data.packing import PackedRows, PackingCollator, PackingSampler, best_fit
from tests.data.test_resume import PLACES, fit

lengths_of_any_kind = st.lists(st.integers(1, 30), min_size=1, max_size=80)
worlds = st.integers(1, 5)


def example(*ids):
    return {"input_ids": torch.tensor(ids, dtype=torch.int32), "labels": torch.tensor(ids, dtype=torch.int32)}


def naive_best_fit(lengths, capacity):
    rows = []
    for length in lengths:
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@settings(max_examples=150, deadline=None)
@given(lengths_of_any_kind, st.integers(30, 90))
def test_rows_are_filled_as_by_trying_every_row(lengths, capacity):
    row_of, count = best_fit(lengths, capacity)
    rows = [[length for length, row in zip(lengths, row_of, strict=True) if row == number] for number in range(count)]
    naive = naive_best_fit(lengths, capacity)
    assert sorted(map(sum, rows)) == sorted(map(sum, naive))
    assert all(sum(row) <= capacity for row in rows)


def test_rows_are_nearly_full():
    lengths = sorted(random.Random(0).choices(range(20, 400), k=2000), reverse=True)
    assert sum(lengths) / (best_fit(lengths, 512)[1] * 512) > 0.99


def test_an_example_that_no_row_can_hold_has_its_own():
    assert best_fit([9, 4, 4], 8) == ([0, 1, 1], 2)


def shards(lengths, capacity, world, seed=0, epoch=0):
    found = []
    for rank in range(world):
        sampler = PackingSampler(lengths, capacity, seed=seed, rank=rank, world=world)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@settings(max_examples=80, deadline=None)
@given(lengths_of_any_kind, st.integers(30, 60), worlds, st.integers(0, 3))
def test_every_example_comes_once_and_every_rank_gets_as_many_rows(lengths, capacity, world, epoch):
    found = shards(lengths, capacity, world, epoch=epoch)
    assert len({len(shard) for shard in found}) == 1
    count = Counter(number for shard in found for row in shard for number in row)
    assert set(count) == set(range(len(lengths)))
    rows = [row for shard in found for row in shard]
    assert all(row and sum(lengths[number] for number in row) <= capacity for row in rows)
    if len(lengths) >= world * -(-best_fit(sorted(lengths, reverse=True), capacity)[1] // world):
        assert set(count.values()) == {1}  # there were enough rows to part
    else:
        assert sum(count.values()) - len(lengths) < world


def test_the_order_belongs_to_seed_and_epoch_and_epochs_are_equally_long():
    lengths = random.Random(1).choices(range(5, 40), k=200)
    first = shards(lengths, 64, 2)
    random.seed(3)
    assert shards(lengths, 64, 2) == first
    other = shards(lengths, 64, 2, epoch=1)
    assert other != first
    assert shards(lengths, 64, 2, seed=1) != first
    assert len(other[0]) == len(first[0])
    together = lambda rows: {frozenset(row) for row in rows[0] + rows[1]}  # noqa: E731
    assert len(together(first) & together(other)) < len(together(first)) / 2  # other examples, too, not the order alone


def test_the_fullest_row_comes_first():
    lengths = [3, 9, 4, 8, 2, 5]
    [rows] = shards(lengths, 10, 1)
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert filled[0] == max(filled)


def test_a_batch_of_packed_rows():
    batch = PackingCollator(pad_token_id=7, pad_to_multiple_of=4)([[example(1, 2, 3), example(4, 5)], [example(6)]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 7, 7], [6, 7, 7, 7, 7, 7, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100], [-100] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["tokens_in_row"].tolist() == [5, 1]
    assert "attention_mask" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_are_their_examples():
    rows = PackedRows([example(1), example(2, 3)])
    assert [each["input_ids"].tolist() for each in rows[1, 0]] == [[2, 3], [1]]


def test_training_is_packed_and_validation_is_not(tokenizer, numbered, capsys):
    path = str(numbered(60))
    data = TextData(path, tokenizer=tokenizer, packing=True, max_length=64)
    data.setup("fit")
    batches = list(data.train_dataloader())
    plain = TextData(path, tokenizer=tokenizer, max_length=64)
    plain.setup()
    examples = [each["input_ids"].tolist() for each in plain.loaded.train.examples]
    packed = [
        part.tolist()
        for batch in batches
        for ids, positions, tokens in zip(
            batch["input_ids"], batch["position_ids"], batch["tokens_in_row"].tolist(), strict=True
        )
        for part in ids[:tokens].tensor_split((positions[:tokens] == 0).nonzero().flatten()[1:].tolist())
    ]
    assert sorted(packed) == sorted(examples)
    assert len(batches) < len(plain.train_dataloader()) / 2
    assert "attention_mask" in next(iter(data.val_dataloader()))
    assert "Packed: 57 examples in" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_streams_are_packed_alike_on_every_rank(tokenizer, numbered, world, monkeypatch):
    monkeypatch.setattr("lora_lightning.data.stream.PACKED_TOGETHER", 16)
    data = TextData(str(numbered(60)), tokenizer=tokenizer, packing=True, streaming=True, max_length=64)
    data.setup()
    stream, found = data.loaded.train, []
    for rank in range(world):
        stream.rank, stream.world = rank, world
        found.append(list(stream))
    assert len({len(rows) for rows in found}) == 1
    seen = Counter(tuple(each["input_ids"].tolist()) for rows in found for row in rows for each in row)
    assert set(seen) == {tuple(each["input_ids"].tolist()) for each in stream.examples()}
    assert all(sum(len(each["input_ids"]) for each in row) <= 64 for rows in found for row in rows)
    stream.rank, stream.world = 0, 1
    assert "position_ids" in next(iter(data.train_dataloader()))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("more", [{}, {"num_workers": 2}, {"streaming": True}], ids=["plain", "workers", "stream"])
def test_a_resumed_run_sees_the_same_packed_rows(tokenizer, numbered, tmp_path, more):
    data = {"batch_size": 2, "val_split": 0.2, "packing": True, "max_length": 48, **more}
    options = {**PLACES["in an epoch"], "data": data}
    path = numbered(35)
    whole, checkpoints = fit(tokenizer, path, tmp_path / "whole", **options)
    assert any("answer" in row and row.count("answer") > 1 for _, rows in whole for row in rows)
    assert len(checkpoints) >= 2
    for name, file in checkpoints.items():
        step = int(name.split("step=")[1].split("-")[0])
        rest, _ = fit(tokenizer, path, tmp_path / f"rest {name}", resume=file, **options)
        assert rest == whole[step:], name
