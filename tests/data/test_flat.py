import pickle
import sys
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lora_lightning.data.flat import FlatRows
from lora_lightning.data.loaders import Collator, Rows

token = st.integers(-100, 2**31 - 1)


def example(ids, labels=None):
    ids = torch.tensor(ids, dtype=torch.int32)
    return {"input_ids": ids, "labels": ids.clone() if labels is None else labels}


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(token, min_size=1, max_size=9), max_size=9))
def test_flat_rows_are_the_rows(tmp_path_factory, rows):
    examples = [example(ids) for ids in rows]
    flat = FlatRows.of(examples)
    same(flat, examples)
    assert flat.lengths() == [len(ids) for ids in rows]
    folder = tmp_path_factory.mktemp("flat") / "rows"
    about = flat.save(folder)
    mapped = FlatRows.load(folder, about)
    same(mapped, examples)
    same(pickle.loads(pickle.dumps(flat)), examples)
    same(pickle.loads(pickle.dumps(mapped)), examples)


def test_numbers_as_of_any_sequence():
    flat = FlatRows.of([example([n]) for n in range(4)])
    assert flat[-1]["input_ids"].tolist() == [3]
    assert [each["input_ids"].item() for each in flat[1:3]] == [1, 2]
    for number in (4, -5):
        with pytest.raises(IndexError, match="there are 4 examples"):
            flat[number]


def test_labels_of_classification_are_one_an_example(tmp_path):
    examples = [example([1, 2, 3], torch.tensor(4)), example([5], torch.tensor(0))]
    flat = FlatRows.of(examples)
    same(flat, examples)
    same(FlatRows.load(tmp_path / "rows", flat.save(tmp_path / "rows")), examples)


def mapped(tmp_path, size=4000):
    flat = FlatRows.of([example(list(range(n % 7 + 1))) for n in range(size)])
    return FlatRows.load(tmp_path / "rows", flat.save(tmp_path / "rows"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_files_are_mapped_and_not_read(tmp_path):
    rows = mapped(tmp_path)
    with open("/proc/self/maps") as maps:
        lines = [line for line in maps if str(tmp_path) in line]
    assert {line.split("/")[-1].strip() for line in lines} == {"input_ids.bin", "labels.bin", "offsets.bin"}
    assert len(pickle.dumps(rows)) < 2000
    assert len(pickle.dumps(rows[7])) < 2000  # an example's tensors do not take the arrays along


def test_what_is_written_to_an_example_stays_there(tmp_path):
    rows = mapped(tmp_path)
    rows[3]["input_ids"][:] = 9
    assert rows[3]["input_ids"].tolist() == [0, 1, 2, 3]


def test_workers_open_the_files_themselves(tmp_path):
    rows = Rows(mapped(tmp_path, 12))
    options = {"batch_size": 4, "collate_fn": Collator()}
    loader = DataLoader(rows, num_workers=1, multiprocessing_context=get_context("spawn"), **options)
    here = DataLoader(rows, **options)
    for ours, theirs in zip(loader, here, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("damage", ["cut", "longer", "changed", "gone"])
@pytest.mark.parametrize("name", ["input_ids", "labels", "offsets"])
def test_damaged_files_are_told(tmp_path, damage, name):
    flat = FlatRows.of([example([n, n]) for n in range(5)])
    about = flat.save(tmp_path / "rows")
    file = tmp_path / "rows" / f"{name}.bin"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = {"cut": content[:-3], "longer": content + b"\0", "changed": content[:8] + b"\x07" + content[9:]}
        file.write_bytes(changed[damage])
    with pytest.raises((ValueError, OSError), match=f"{name}.bin"):
        FlatRows.load(tmp_path / "rows", about)
