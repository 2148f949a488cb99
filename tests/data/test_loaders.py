import pytest
import torch

from lora_lightning.data.loaders import Collator, ResumableLoader, Rows, loader_options
from lora_lightning.data.samplers import LengthGroupedSampler, ShardSampler


def example(*ids, label=None):
    labels = torch.tensor([-100, *ids[1:]]) if label is None else torch.tensor(label)
    return {"input_ids": torch.tensor(ids, dtype=torch.int32), "labels": labels}


def test_batches_are_padded_at_the_right():
    batch = Collator(pad_token_id=7)([example(1, 2, 3), example(7)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_to_a_multiple_and_single_labels():
    batch = Collator(pad_to_multiple_of=4)([example(1, 2, 3, 4, 5, label=2), example(1, label=0)])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("label", [None, 3])
def test_fillers_have_no_labels(label):
    rows = Rows([example(1, 2, label=label), example(3, 4, label=label)])
    assert len(rows) == 2
    assert (rows[0]["labels"] != -100).any()
    assert (rows[2]["labels"] == -100).all()
    assert rows[2]["input_ids"].tolist() == [1, 2]
    assert (rows[0]["labels"] != -100).any()  # the row itself is left as it is


def test_shards_with_fillers_hold_every_label_once():
    rows = Rows([example(0, n) for n in range(1, 8)])
    labels = [rows[n]["labels"] for rank in range(3) for n in ShardSampler(7, rank=rank, world=3)]
    assert sorted(torch.cat(labels).tolist()) == sorted([*range(1, 8), *[-100] * (7 + 2 * 2)])


def loader(workers=0):
    rows = Rows([example(n, n) for n in range(22)])
    sampler = LengthGroupedSampler(None, 22, batch_size=4)
    return ResumableLoader(
        rows, batch_size=4, sampler=sampler, collate_fn=Collator(), **loader_options(workers, 0)
    )  # fmt: skip


def seen(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loop_continues_where_it_was(workers):
    whole = loader(workers)
    whole.sampler.set_epoch(3)
    batches, steps = iter(whole), []
    for _ in range(2):
        steps += seen([next(batches)])
    state = whole.state_dict()
    resumed = loader(workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 6
    assert seen(resumed) == seen(batches)
    for each in (resumed, whole):
        each.sampler.set_epoch(4)
    assert seen(resumed) == seen(whole)
    for each in (resumed, whole) if workers else ():
        each._iterator._shutdown_workers()  # ended with the interpreter, they leave folders among temporary files


def test_iterating_takes_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)
