"""The manifest of a sweep: whole, grown, refused in another sweep's folder; and what sets jobs apart, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps import manifest
from lora_lightning.sweeps.manifest import Entry, Manifest, alone_in, entries, open_sweep, short_overrides
from lora_lightning.sweeps.runs import Job


@pytest.fixture
def sweep():
    return Manifest(
        name="2025-01-31",
        command=("scripts/train.py", "-m", "lora.r=8,16"),
        script="scripts/train.py",
        config_name="train",
        overrides=("lora.r=8,16", "experiment=smoke"),
        metric="val_loss",
        mode="min",
        sweeper="hydra._internal.BasicSweeper",
        launcher="lora_local",
        started=1.5,
        version="0.1.0",
        jobs=(Entry(0, ("lora.r=8",), "0"), Entry(1, ("lora.r=16",), "1")),
    )


def test_what_is_written_is_what_is_read(sweep, tmp_path):
    assert manifest.read(tmp_path) is None
    sweep.write(tmp_path)
    assert manifest.read(tmp_path) == sweep
    assert [each.name for each in tmp_path.iterdir()] == ["sweep.json"]
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["format"] == 1
    assert content["jobs"][1] == {"number": 1, "overrides": ["lora.r=16"], "folder": "1", "same_as": None}


def test_a_sweep_goes_on_where_it_was(sweep, tmp_path):
    open_sweep(tmp_path, sweep)
    later = replace(sweep, started=99.0, version="9", launcher="lora_packed", jobs=(Entry(2, ("lora.r=4",), "2"),))
    opened = open_sweep(tmp_path, later)
    assert (opened.started, opened.version, opened.launcher) == (1.5, "0.1.0", "lora_packed")
    assert [entry.number for entry in opened.jobs] == [0, 1, 2]
    assert manifest.read(tmp_path) == opened


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"script": "other.py"}, "script: was scripts/train.py, is other.py"),
        ({"metric": "val_f1", "mode": "max"}, "metric: was val_loss, is val_f1"),
        ({"overrides": ("lora.r=8,32", "experiment=smoke")}, "lora.r=8,16 is gone, lora.r=8,32 is new"),
        ({"overrides": ("experiment=smoke", "lora.r=8,16")}, "in another order"),
        ({"sweeper": "optuna"}, "is optuna"),
        ({"jobs": (Entry(1, ("lora.r=32",), "1"),)}, "job 1 is lora.r=32 in 1, and was lora.r=16 in 1"),
    ],
)
def test_another_sweep_is_refused_and_nothing_written(sweep, tmp_path, change, told):
    open_sweep(tmp_path, sweep)
    with pytest.raises(LoraConfigError, match="another sweep") as error:
        open_sweep(tmp_path, replace(sweep, **change))
    assert told in str(error.value)
    assert manifest.read(tmp_path) == sweep


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "jobs": [{"number": 0}]}'])
def test_a_broken_manifest_is_told(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(LoraConfigError, match=r"sweep\.json"):
        manifest.read(tmp_path)


def test_jobs_with_equal_overrides_are_known(tmp_path):
    jobs = [
        Job(n, overrides, tmp_path / str(n)) for n, overrides in enumerate([("a=1", "b=2"), ("a=2",), ("b=2", "a=1")])
    ]
    made = entries(jobs, tmp_path)
    assert [entry.same_as for entry in made] == [None, None, 0]
    assert [entry.folder for entry in made] == ["0", "1", "2"]
    assert entries([Job(3, ("a=2",), tmp_path / "3")], tmp_path, made)[0].same_as == 1


def test_two_processes_never_run_one_sweep(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from lora_lightning.sweeps.manifest import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LoraConfigError, match=f"process {process.pid} on "), alone_in(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with alone_in(tmp_path):  # free again, though it was killed
        pass


def _jobs(*overrides):
    return [SimpleNamespace(overrides=each) for each in overrides]


def test_what_sets_jobs_apart_is_short():
    jobs = _jobs(
        ["lora.r=8", "optimizer.lr=1e-3", "data.path=/very/long/folder/of/somebody/a.jsonl", "seed=1"],
        ["lora.r=8", "optimizer.lr=3e-4", "data.path=/very/long/folder/of/somebody/b.jsonl", "seed=1"],
    )
    assert short_overrides(jobs) == ["lr=1e-3 path=…/a.jsonl", "lr=3e-4 path=…/b.jsonl"]
    assert short_overrides(_jobs(["a.x=1", "b.x=1"], ["a.x=2", "b.x=1"], ["a.x=1", "b.x=2"])) == [
        "a.x=1 b.x=1",
        "a.x=2 b.x=1",
        "a.x=1 b.x=2",
    ]
    assert short_overrides(_jobs(["+a.b=1"], ["~a.c"])) == ["b=1", "no c"]
    assert short_overrides(_jobs(["lora.r=8"])) == ["r=8"]
    assert short_overrides(_jobs([])) == ["defaults"]
    assert short_overrides([]) == []


_keys = st.lists(st.sampled_from(["a", "b", "r", "lr", "model"]), min_size=1, max_size=3).map(".".join)
_values = st.one_of(st.integers().map(str), st.floats().map(str), st.text("ab/'", max_size=60))
_overrides = st.dictionaries(_keys, _values, max_size=4).map(lambda d: tuple(f"{k}={v}" for k, v in sorted(d.items())))


@given(st.lists(_overrides, max_size=6))
def test_different_jobs_have_different_short_overrides(each_one):
    names = short_overrides(_jobs(*each_one))
    assert len(names) == len(each_one)
    for (one, name), (other, another) in combinations(zip(each_one, names, strict=True), 2):
        assert (name == another) == (one == other)
