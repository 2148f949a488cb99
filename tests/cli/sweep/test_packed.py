"""Jobs trained together against the same jobs, each run by itself."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from lora_lightning.cli import train
from lora_lightning.cli.group_file import GroupFile, Packed
from lora_lightning.cli.packing import train_together
from lora_lightning.data import TinyText
from lora_lightning.data.module import DataModule
from lora_lightning.sweeps.packed.output import Routed
from lora_lightning.sweeps.runs import read_json
from tests.cli.conftest import ROOT

SMOKE = (
    "experiment=smoke",
    "trainer.accelerator=cpu",
    "trainer.max_steps=12",
    "trainer.val_check_interval=5",
    "trainer.log_every_n_steps=1",
    "callbacks=minimal",
)
# What jobs may have for themselves: rank, scale, targets, dropout, seed (values, order of rows), rates, schedule,
# clipping, accumulation, early stopping.
JOBS = {
    0: ("lora.r=4", "seed=1"),
    1: (
        *("lora.r=16", "lora.use_rslora=true", "lora.lora_dropout=0.3"),
        *("learning_rate=3e-3", "trainer.gradient_clip_val=0.1", "seed=2"),
    ),
    2: (
        *("lora.r=8", "lora.lora_alpha=4", "lora.lora_dropout=0.0", "optimizer.weight_decay=0.1"),
        *("scheduler=constant", "trainer.accumulate_grad_batches=2", "seed=3"),
    ),
    3: (
        *("lora.r=2", "lora.target_modules=[q_proj,v_proj]", "seed=4"),
        *("+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping", "+callbacks.early.monitor=val_loss"),
        *("+callbacks.early.min_delta=100", "+callbacks.early.patience=1"),
    ),
}
DIVERGING = ("optimizer.lr=1e200", "lora.r=4")


class Unknown(TinyText):
    """Does not say what its rows are made of, so that nobody knows whether others want the same."""

    content = DataModule.content


@pytest.fixture(scope="module", autouse=True)
def _in_a_sweep(demo_cache, tmp_path_factory):
    """All runs are jobs of a sweep; what they leave in the process is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LIGHTNING_SWEEP", str(tmp_path_factory.mktemp("sweep")))
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        yield


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Trains jobs together: together({number: overrides}, *common, places=…) gives their folders, by number."""

    def run(jobs, *common, order=None, **settings):
        root = tmp_path_factory.mktemp("together")
        made = [_packed(root / str(number), number, (*common, *jobs[number])) for number in order or jobs]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("stdout", "stderr"):
                patch.setattr(sys, name, Routed(getattr(sys, name)))
            failed = train_together(GroupFile(tuple(made), **settings), lambda stop: None)
        return {number: root / str(number) for number in jobs}, failed

    return run


def _packed(folder: Path, number: int, overrides: tuple[str, ...]) -> Packed:
    return Packed(number, str(folder), (*SMOKE, *overrides, f"hydra.run.dir={folder}"), str(folder / "job.log"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs one job by itself, in this process: alone(*overrides) gives its folder."""

    def run(*overrides):
        folder = tmp_path_factory.mktemp("alone") / "run"
        quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py", *SMOKE, *overrides, *quiet, f"hydra.run.dir={folder}"])
            GlobalHydra.instance().clear()
            train.main()
            GlobalHydra.instance().clear()
        return folder

    return run


def curves(folder: Path) -> dict[str, list[float]]:
    """Each column of a run's metrics but what is measured with a clock."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {key for row in rows for key in row} - {"tokens_per_second"}
    return {key: [float(row[key]) for row in rows if row.get(key)] for key in sorted(columns)}


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    a, b = curves(one), curves(other)
    assert a.keys() == b.keys()
    assert len(a["train_loss"]) > 3
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key
    torch.testing.assert_close(adapter(one), adapter(other), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def exact(together):
    """The jobs in float64, beside one that diverges."""
    return together(JOBS | {4: DIVERGING}, "trainer.precision=64-true")


def test_each_job_is_what_it_is_by_itself(exact, alone):
    folders, failed = exact
    assert failed
    for number, overrides in JOBS.items():
        by_itself = alone("trainer.precision=64-true", *overrides)
        assert_same(folders[number], by_itself, 1e-10)
        ours, theirs = result(folders[number]), result(by_itself)
        assert ours["shared_with"] == 4
        measured = {"seconds", "tokens_per_second", "peak_memory_bytes", "adapter_path", "best_adapter_path"}
        for key in theirs.keys() - measured - {"overrides", "advice"}:
            close = pytest.approx(theirs[key], rel=1e-10) if isinstance(theirs[key], float) else theirs[key]
            assert ours[key] == close, key
        reports = {"loss.png", "about.json", "advice.md", "report.html"}
        names, ours_too = ({each.name for each in place.iterdir()} for place in (by_itself, folders[number]))
        assert names - reports <= ours_too
        config = [(each / "config.yaml").read_text().replace(str(each), "") for each in (folders[number], by_itself)]
        assert config[0] == config[1]


def test_an_early_stop_is_the_jobs_own(exact):
    folders, _ = exact
    assert result(folders[3])["steps"] == 10
    assert result(folders[3])["ended_by"] == "early stopping"
    assert [result(folders[number])["steps"] for number in (0, 1)] == [12, 12]


def test_a_job_that_diverges_ends_alone(exact, together):
    folders, _ = exact
    assert result(folders[4])["status"] == "failed"
    assert "not finite" in (folders[4] / "job.log").read_text()
    without, failed = together(JOBS, "trainer.precision=64-true", order=[3, 1, 0, 2])
    assert not failed
    for number in JOBS:
        # Products of fewer rows are rounded otherwise, so not to the bit; and in whatever order they come.
        assert_same(folders[number], without[number], 1e-12)


def test_float32_stays_close_to_the_run_by_itself(together, alone):
    jobs = {0: ("lora.r=16", "lora.lora_dropout=0.1", "seed=5"), 1: ("lora.r=4", "learning_rate=3e-3", "seed=6")}
    common = ("trainer.max_steps=50", "trainer.val_check_interval=25")
    folders, _ = together(jobs, *common)
    for number, overrides in jobs.items():
        by_itself = alone(*common, *overrides)
        for key in ("train_loss", "val_loss"):
            assert curves(folders[number])[key] == pytest.approx(curves(by_itself)[key], abs=1e-4)


# ---- halving


def test_the_worse_half_stops_at_each_rung_and_waiting_jobs_take_their_places(together):
    rates = {0: "1e-5", 1: "1e-2", 2: "1e-4", 3: "3e-2", 4: "2e-2"}
    jobs = {number: (f"optimizer.lr={rate}", "lora.r=4") for number, rate in rates.items()}
    steps = ("trainer.max_steps=16", "trainer.val_check_interval=16")  # rungs bring validations of their own
    folders, failed = together(jobs, *steps, halving=True, metric="val_loss", places=4)
    assert not failed
    results = {number: result(folder) for number, folder in folders.items()}
    assert all(each["status"] == "finished" for each in results.values())
    assert results[0]["ended_by"] == "halving at step 4, place 4 of 4"
    assert results[2]["ended_by"] == "halving at step 4, place 3 of 4"
    assert (folders[0] / "adapter" / "adapter_model.safetensors").is_file()
    best = min(results.values(), key=lambda each: each["val_loss"])
    assert best["ended_by"] is None
    assert best["steps"] == 16
    assert [len(json.loads((folders[number] / "rungs.json").read_text())["values"]) for number in (0, 2)] == [1, 1]


def test_without_a_metric_of_a_validation_nothing_can_be_halved(together):
    jobs = {0: ("lora.r=4",), 1: ("lora.r=8",)}
    folders, failed = together(jobs, "trainer.max_steps=8", halving=True, metric="val_los")
    assert failed
    for folder in folders.values():
        assert "does not measure (did you mean val_loss?)" in (folder / "job.log").read_text()
        assert result(folder)["status"] == "failed"


# ---- the process


def test_told_to_end_the_jobs_save_and_started_again_they_come_to_the_same(together, warm_python, tmp_path):
    jobs = {0: ("lora.r=4", "seed=1"), 1: ("lora.r=8", "lora.lora_dropout=0.2", "seed=2")}
    common = ("trainer.max_steps=60", "trainer.val_check_interval=20", "trainer.precision=64-true")
    whole, _ = together(jobs, *common)

    def start(*more: str) -> subprocess.Popen[bytes]:
        made = [_packed(tmp_path / str(number), number, (*common, *own, *more)) for number, own in jobs.items()]
        path = GroupFile(tuple(made)).write(tmp_path / "packed" / "group-0.json")
        with (tmp_path / "screen.txt").open("ab") as screen:
            return subprocess.Popen(
                [warm_python, "-m", "lora_lightning.cli.packed", str(path)], stdout=screen, stderr=screen
            )

    process = start()
    until = time.monotonic() + 300
    while (read_json(tmp_path / "1" / "progress.json") or {"step": 0})["step"] < 3:
        assert process.poll() is None, (tmp_path / "screen.txt").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    for number in jobs:
        assert result(tmp_path / str(number))["status"] == "interrupted"
        assert (tmp_path / str(number) / "checkpoints" / "stopped.ckpt").is_file()
    assert start("resume=auto").wait(300) == 0, (tmp_path / "screen.txt").read_text()
    for number in jobs:
        assert result(tmp_path / str(number))["status"] == "finished"
        torch.testing.assert_close(adapter(tmp_path / str(number)), adapter(whole[number]), rtol=1e-10, atol=1e-10)


# ---- the launcher


def test_a_grid_is_packed_but_for_what_goes_alone(command, warm_python, tmp_path):
    out = tmp_path / "sweep"
    grid = (
        "lora.use_dora=false,true",
        "lora.r=2,4",
        "callbacks=minimal",
        "trainer.max_steps=4",
        f"hydra.sweep.dir={out}",
    )
    words = ("-m", "hydra/launcher=lora_packed", "experiment=smoke", "trainer=cpu", *grid)
    done = command(ROOT / "scripts" / "train.py", *words, python=warm_python)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "Jobs 0, 1 are trained together on one base." in done.stdout
    assert "Jobs 2, 3 go alone, each: lora.use_dora" in done.stdout
    assert [job.number for job in GroupFile.read(out / "packed" / "group-0.json").jobs] == [0, 1]
    results = [result(out / str(number)) for number in range(4)]
    assert [each["status"] for each in results] == ["finished"] * 4
    assert [each.get("shared_with") for each in results] == [1, 1, None, None]
    assert (out / "sweep.md").is_file()


def test_halving_is_refused_where_jobs_are_processes_of_their_own(command, tmp_path):
    done = command(
        ROOT / "scripts" / "train.py", "-m", "experiment=smoke", "lora.r=2,4", "sweep.halving=true",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "hydra/launcher=lora_packed" in done.stderr
    assert "hparams_search=optuna" in done.stderr


def test_rows_that_nobody_can_tell_apart_are_loaded_by_each_job(together):
    own = (f"data._target_={__name__}.Unknown", "trainer.max_steps=2")
    folders, failed = together({0: ("lora.r=2",), 1: ("lora.r=4",)}, *own)
    assert not failed
    assert {result(folder)["shared_with"] for folder in folders.values()} == {1}
