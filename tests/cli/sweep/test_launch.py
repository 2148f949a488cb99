"""``hydra/launcher=lora_local`` under somebody's own script: what runs, what comes back, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lora_lightning.cli.sweep import launch
from lora_lightning.cli.sweep.command import JobFailed
from lora_lightning.errors import LoraConfigError


def attempts(number: int) -> int:
    """How often a job was begun."""
    log = Path("out") / str(number) / "job.log"
    return log.read_text().count("attempt") if log.exists() else 0


def wait_until(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def refused(multirun, capsys):
    """What is told of a sweep that is refused: refused("x=1,2")."""

    def run(*overrides: str) -> str:
        with pytest.raises(SystemExit) as left:
            multirun(*overrides)
        assert left.value.code == 1
        return re.sub(r"\s+", " ", capsys.readouterr().err)

    return run


def test_each_job_runs_with_its_own_settings_and_returns_its_own_value(multirun):
    jobs = multirun("x=1,2", "y=3,5")
    assert [job.return_value for job in jobs] == [3, 5, 6, 10]
    assert [job.overrides for job in jobs] == [["x=1", "y=3"], ["x=1", "y=5"], ["x=2", "y=3"], ["x=2", "y=5"]]
    assert [(job.cfg.x, job.cfg.y) for job in jobs] == [(1, 3), (1, 5), (2, 3), (2, 5)]
    assert [job.hydra_cfg.hydra.job.num for job in jobs] == [0, 1, 2, 3]
    assert [Path(job.hydra_cfg.hydra.runtime.output_dir) for job in jobs] == [
        Path.cwd() / "out" / str(n) for n in range(4)
    ]
    assert all(job.task_name == "app" and "hydra" not in job.cfg for job in jobs)
    for number, job in enumerate(jobs):
        folder = Path("out") / str(number)
        assert json.loads((folder / "result.json").read_text())["value"] == job.return_value
        assert (folder / ".hydra" / "overrides.yaml").read_text().split() == [
            "-",
            job.overrides[0],
            "-",
            job.overrides[1],
        ]
        assert f"job {number} of {Path.cwd() / 'out'}" in (folder / "job.log").read_text()
    manifest = json.loads(Path("out/sweep.json").read_text())
    assert (manifest["overrides"], manifest["script"]) == (["x=1,2", "y=3,5"], str(Path("app.py").resolve()))
    assert Path("out/sweep.md").exists()


def test_what_is_finished_is_not_run_again_and_the_rest_is(multirun):
    first = multirun("x=1,2,3", "fails=2")
    with pytest.raises(JobFailed, match="no luck today"):
        _ = first[1].return_value
    assert [attempts(number) for number in range(3)] == [1, 1, 1]
    Path("out/2/result.json").write_text('{"status": "fin')  # broken off while it was written
    again = multirun("x=1,2,3", "fails=2")
    assert [again[0].return_value, again[2].return_value] == [2, 6]
    assert [attempts(number) for number in range(3)] == [1, 2, 2]


def test_a_failed_job_does_not_stop_the_others_unless_it_is_to(multirun):
    jobs = multirun("x=2,1", "fails=2")
    assert jobs[1].return_value == 2
    with pytest.raises(JobFailed, match=r"Job 0 \(x=2 fails=2\): exit status 1: ValueError: no luck today"):
        _ = jobs[0].return_value


def test_fail_fast_starts_no_more(multirun):
    jobs = multirun("x=2,1,3", "fails=2", "hydra.launcher.fail_fast=true")
    for job in jobs[1:]:
        with pytest.raises(JobFailed, match="not started, job 0 failed") as failed:
            _ = job.return_value
        assert failed.value.state == "not started"  # a search runs it again
    assert [attempts(number) for number in range(3)] == [1, 0, 0]


def test_equal_jobs_run_once_and_both_return(multirun, capsys):
    jobs = multirun("x=1,3,1")
    assert [job.return_value for job in jobs] == [2, 6, 2]
    assert "Job 2 has the settings of job 0" in capsys.readouterr().out
    assert not Path("out/2").exists()


def test_nothing_swept_is_one_job(multirun):
    assert [job.return_value for job in multirun()] == [2]


def test_a_grid_without_jobs(refused):
    assert "has no jobs: one of its keys is given no values (x=range(0,0))" in refused("x=range(0,0)")
    assert not Path("out/sweep.json").exists()


def test_all_that_is_wrong_with_the_settings_of_the_sweep(refused):
    told = refused("x=1,2", "hydra.launcher.jobs_per_device=0", "hydra.launcher.mode=least", "+hydra.launcher.fail=1")
    assert "jobs_per_device must be a whole number from 1 on, got 0" in told
    assert "mode must be min or max, got 'least'" in told
    assert "no 'fail' (did you mean fail_fast?)" in told


def test_more_devices_than_there_are(refused):
    told = refused("x=1,2", "trainer.accelerator=gpu", "trainer.devices=64,65")
    assert "job 0 needs 64 GPUs" in told
    assert "job 3 needs 65 GPUs" in told
    assert not Path("out/0").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "machines": (
            ("+trainer.num_nodes=1,2",),
            "job 1 .*trainer.num_nodes=2, and a job of a sweep runs on one machine",
        ),
        "no number": (("trainer.devices=1,several",), "trainer.devices must be a number from 1 on, .* got 'several'"),
        "named GPUs": (("trainer.devices=[0,1]", "trainer.accelerator=gpu"), r"names GPUs, and which ones a job gets"),
        "GPUs in a text": (("trainer.devices='2,3'", "trainer.accelerator=gpu"), r"devices=2,3 names GPUs, and which"),
        "more than given": (("trainer.devices=1,2", "hydra.launcher.devices_per_job=1"), "sweep.devices_per_job=1"),
        "one folder": (("x=1,2", "hydra.sweep.subdir=same"), "is that of job 0 as well: hydra.sweep.subdir has to"),
    }.values(),
    ids=lambda value: None,
)
def test_jobs_that_cannot_run_are_told_before_any_starts(refused, overrides, message):
    told = refused(*overrides)
    assert re.search(message, told), told
    assert "nothing was started" in told
    assert not Path("out/sweep.json").exists()


def test_all_lora_configurations_that_are_refused(refused, app):
    lora = "lora: {_target_: lora_lightning.LoraCallback, config: {r: '${x}', lora_dropout: '${y}'}}\n"
    (app.parent / "conf" / "config.yaml").open("a").write(lora)
    told = refused("x=8,0,-1", "y=0,3")
    assert "5 of 6 jobs cannot be run" in told
    assert "jobs 2, 3 (the first is x=0 y=0): r must be at least 1, got 0" in told
    assert "jobs 4, 5 (the first is x=-1 y=0): r must be at least 1, got -1" in told
    assert "jobs 1, 3, 5 (the first is x=8 y=3): lora_dropout must be a probability in [0, 1), got 3" in told


def test_a_folder_of_another_sweep(multirun, refused):
    multirun("x=1,2")
    told = refused("x=1,3")
    assert "is the folder of another sweep" in told
    assert "x=1,2 is gone, x=1,3 is new" in told


def test_a_sweep_of_which_nothing_was_started_leaves_its_folder_to_the_corrected_one(multirun, refused, monkeypatch):
    def prepare(configs):
        raise LoraConfigError("no such data")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "prepare_all", prepare)
        assert "no such data" in refused("x=1,2")
    assert [job.return_value for job in multirun("x=1,3")] == [2, 6]
    for result in Path("out").glob("*/result.json"):
        result.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "prepare_all", prepare)
        refused("x=1,3")
    assert "is the folder of another sweep" in refused("x=1,2")


def test_a_metric_that_no_job_reports(refused):
    told = refused("x=1,2", "hydra.launcher.metric=valu")
    assert "reports 'valu' (did you mean value?)" in told
    assert [attempts(0), attempts(1)] == [1, 1]
    assert Path("out/sweep.csv").exists()


@pytest.mark.parametrize("variable", [("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")])
def test_a_sweep_under_torchrun(refused, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    assert "started by torchrun" in refused("x=1,2")
    assert not Path("out/0").exists()


def test_a_sweep_runs_once_at_a_time(start, refused):
    sweep = start("-m", "x=2", "wait_for=go")
    wait_until(lambda: attempts(0))
    assert "this sweep is being run by process" in refused("x=2", "wait_for=go")
    Path("go").touch()
    assert sweep.wait(300) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_ended_goes_on_with_what_was_missing(start, multirun, number):
    sweep = start("-m", "x=1,2,3", "wait_for=go")
    wait_until(lambda: attempts(1))
    (finished,) = [path.stat().st_mtime_ns for path in Path("out").glob("*/result.json")]
    os.kill(sweep.pid, number)
    status, told = sweep.wait(300), sweep.stdout.read()
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number), told
    assert [attempts(each) for each in range(3)] == [1, 1, 0]
    Path("go").touch()
    assert [job.return_value for job in multirun("x=1,2,3", "wait_for=go")] == [2, 4, 6]
    assert [attempts(each) for each in range(3)] == [1, 2, 1]
    assert Path("out/0/result.json").stat().st_mtime_ns == finished


def test_the_process_of_a_sweep_stays_light(start, app):
    watched = """
import atexit, os, sys
heavy = ("torch", "lightning", "transformers")
if "LORA_LIGHTNING_JOB" not in os.environ:
    atexit.register(lambda: print("LOADED", [name for name in heavy if name in sys.modules]))
"""
    app.write_text(watched + app.read_text())
    told, _ = start("-m", "x=1,2").communicate(timeout=300)
    assert "2 jobs: 2 finished" in told
    assert "LOADED []" in told


def test_a_failed_sweep_ends_with_status_1_and_no_traceback_but_the_jobs(start):
    sweep = start("-m", "x=1,2", "fails=2")
    told, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert "no luck today" in told
    assert told.count("Traceback") == 1
    assert told.index("Traceback") < told.index("Report: ")  # the last lines of the job's own log


def test_what_only_jobs_of_one_process_can_have(refused):
    assert "add hydra/launcher=lora_packed. With this launcher sweep.jobs_per_device" in refused(
        "x=1,2", "+sweep.jobs_at_once=2"
    )
