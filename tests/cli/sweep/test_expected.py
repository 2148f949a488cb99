"""``sweep.dry_run=true``: what is told, that nothing is started, and how the total comes about."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.cli.sweep.expected import makespan
from lora_lightning.sweeps.devices import Pool
from lora_lightning.sweeps.runs import Job
from tests.cli.conftest import ROOT

pytestmark = pytest.mark.usefixtures("warm_starts")

TRAIN = ROOT / "scripts" / "train.py"
FAST = ("experiment=smoke", "data.rows=32", "data.val_rows=8", "hydra.sweep.dir=out", "sweep.dry_run=true")


def _finished(folder: Path, *overrides: str) -> None:
    """A job's folder as a finished run leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("")
    (folder / "result.json").write_text(json.dumps({"status": "finished", "overrides": overrides}))


def test_jobs_are_listed_and_none_is_started(command, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    grid = ("-m", *FAST, "lora.r=2,4", "trainer.max_steps=4,4000")
    told = command(TRAIN, *grid, cwd=tmp_path, **environment)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Trying 5 steps") == 1  # one for all: ranks and lengths are no other speed
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in told.stdout.splitlines() if "│" in line]
    assert [row[:4] for row in rows] == [
        ["0", "r=2 max_steps=4", "1 CPU", "would run"],
        ["1", "r=2 max_steps=4000", "1 CPU", "would run"],
        ["2", "r=4 max_steps=4", "1 CPU", "would run"],
        ["3", "r=4 max_steps=4000", "1 CPU", "would run"],
    ]
    assert rows[0][4] == rows[2][4]
    assert rows[1][4] == rows[3][4] != rows[0][4]
    assert re.search(r"4 jobs would take about \d+ .*, one after another. Nothing was started", told.stdout)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_told_and_taken_for_a_measure(command, tmp_path):
    _finished(tmp_path / "out" / "0", *FAST, "lora.r=2", "seed=1")
    (tmp_path / "out" / "1" / "checkpoints").mkdir(parents=True)
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    told = command(TRAIN, "-m", *FAST, "lora.r=2,4,2", "seed=1", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert told.returncode == 0, told.stderr
    assert "Trying" not in told.stdout
    states = [re.split(r"\s*│\s*", line)[4] for line in told.stdout.splitlines() if "│" in line]
    assert states == ["finished", "would go on", "as job 0"]
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.name != "multirun.yaml") == before


def test_a_trial_that_fails_is_told_with_what_it_said(command, tmp_path):
    told = command(
        TRAIN,
        "-m",
        *FAST,
        "lora.r=2,4",
        "trainer.precision=7-bit",
        cwd=tmp_path,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert told.returncode == 0, told.stderr
    assert "2 jobs would run; how long they take is not known" in told.stdout
    assert "The trial of job 0 ended with status 1" in told.stdout
    assert "7-bit" in told.stdout


def _jobs(*devices: int, accelerator: str = "gpu") -> list[Job]:
    return [Job(number, (), Path("out"), each, accelerator) for number, each in enumerate(devices)]


@pytest.mark.parametrize(
    ("devices", "seconds", "pool", "together"),
    [
        ((1, 1, 1), (5, 5, 5), Pool(gpus=["0"], cores=4), 15),
        ((1, 1, 1), (5, 5, 5), Pool(gpus=["0", "1"], cores=4), 10),
        ((1, 1, 1), (5, 5, 5), Pool(3, gpus=["0"], cores=4), 5),
        ((1, 2, 1), (5, 5, 5), Pool(gpus=["0", "1"], cores=4), 15),  # the small one waits behind the large one
        ((1, 1, 1), (9, 2, 2), Pool(gpus=["0", "1"], cores=4), 9),
        ((), (), Pool(gpus=[], cores=4), 0),
    ],
)
def test_jobs_start_in_order_as_places_become_free(devices, seconds, pool, together):
    assert makespan(_jobs(*devices), dict(enumerate(seconds)), pool) == together
    assert makespan(_jobs(*devices), dict(enumerate(seconds)), pool) == together  # all places were given back


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 4))
def test_it_is_never_shorter_than_it_can_be_nor_longer_than_one_after_another(seconds, places):
    pool = Pool(places, gpus=[], cores=4)
    together = makespan(_jobs(*[1] * len(seconds), accelerator="cpu"), dict(enumerate(seconds)), pool)
    assert max(max(seconds), sum(seconds) / places) - 1e-9 <= together <= sum(seconds) + 1e-9
