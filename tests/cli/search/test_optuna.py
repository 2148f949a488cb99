"""`hydra/sweeper=lora_optuna` in somebody's app, under Hydra's own launcher."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time

import pytest
from omegaconf import OmegaConf

optuna = pytest.importorskip("optuna")

OPTUNA = "hydra/sweeper=lora_optuna"
SPACE = ("x=interval(-5,5)", "y=tag(log,interval(1e-6,1))", "kind=a,b")


def parameters(trials):
    return [trial.params for trial in trials]


def states(trials):
    return [trial.state.name for trial in trials]


def test_trials_are_jobs_and_the_best_is_told(search):
    done = search(OPTUNA, *SPACE, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=4")
    assert done.status == 0, done.screen
    trials = done.trials()
    assert states(trials) == ["COMPLETE"] * 8
    assert [int(job) for job, *_ in done.started] == list(range(8))
    for trial, (_, *overrides) in zip(trials, done.started, strict=True):
        assert overrides == [f"{key}={value}" for key, value in trial.params.items()]
        x, y, kind = (trial.params[key] for key in ("x", "y", "kind"))
        assert trial.value == pytest.approx((x - 2) ** 2 + (math.log10(y) + 3) ** 2 + (kind != "b") + 8)
    winner = min(trials, key=lambda trial: trial.value)
    results = OmegaConf.to_container(OmegaConf.load(done.folder / "optimization_results.yaml"))
    assert results == {"name": "optuna", "best_params": winner.params, "best_value": winner.value}
    assert f"Best {winner.value:.6g}, job {winner.number}: x={winner.params['x']:.6g}" in done.screen.splitlines()[-1]
    assert (done.folder / "multirun.yaml").is_file()
    assert "Warning" not in done.screen


def kill_after(command, keywords, folder, started):
    """Start a search and end it without a warning while one of its jobs runs, the last of so many that have begun."""
    keywords["env"]["STALL_AT"] = str(started)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **keywords)
    log = folder / "started"
    while not log.exists() or len(log.read_text().splitlines()) < started:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_search_goes_on_as_if_nothing_had_been(search, begin):
    options = (OPTUNA, *SPACE, "hydra.sweeper.n_trials=9", "hydra.sweeper.n_jobs=3")
    whole = search(*options, folder="whole")
    command, keywords, folder = begin(*options, folder="killed")
    kill_after(command, keywords, folder, started=5)  # the second of the second three
    with (folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code":6,"worker')  # and it was writing
    gone_on = search(*options, folder="killed")
    assert gone_on.status == 0, gone_on.screen
    assert parameters(gone_on.trials()) == parameters(whole.trials())
    assert [trial.value for trial in gone_on.trials()] == [trial.value for trial in whole.trials()]
    jobs = [int(job) for job, *_ in gone_on.started]
    # Hydra's launcher tells what came of jobs when the last of a batch has ended: the second batch was open altogether.
    assert jobs == [*range(5), *range(3, 9)]
    assert len({" ".join(line) for line in gone_on.started}) == 9
    more = search(*options[:4], "hydra.sweeper.n_jobs=3", "hydra.sweeper.n_trials=11", folder="killed")
    assert [int(job) for job, *_ in more.started][len(jobs) :] == [9, 10]


def test_what_repeats_is_not_run_again(search):
    options = (
        "kind=a,b",
        "r=4,8",
        "hydra.sweeper.n_trials=30",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.sampler=random",
    )
    done = search(OPTUNA, *options)
    assert done.status == 0, done.screen
    trials = done.trials()
    assert len({tuple(overrides) for _, *overrides in done.started}) == len(done.started) == 4
    assert [int(job) for job, *_ in done.started] == list(range(4))
    assert 4 < len(trials) < 30  # once all have been tried there is nothing left to try
    assert f"{len(trials) - 4} repeated earlier trials" in done.screen


def test_what_fails_is_told_and_the_search_goes_on(search):
    done = search(OPTUNA, "fails=a", "kind=a,b", "x=1,2,3,4", "hydra.sweeper.sampler=grid", "hydra.sweeper.n_jobs=4")
    assert done.status == 0, done.screen
    trials = done.trials()
    assert (
        sorted((trial.params["kind"], trial.state.name) for trial in trials)
        == [("a", "FAIL")] * 4 + [("b", "COMPLETE")] * 4
    )
    assert "4 trials failed" in done.screen
    assert "kind a is not to my taste" in done.screen
    assert OmegaConf.load(done.folder / "optimization_results.yaml").best_params == {"kind": "b", "x": 2}


def test_a_value_that_is_no_number_is_the_worst(search):
    done = search(OPTUNA, "returns=not", "kind=a,b", "hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=2")
    assert done.status == 0, done.screen
    assert {trial.params["kind"]: trial.value for trial in done.trials()} == {"a": float("inf"), "b": 4 + 1 + 8}
    assert "One trial at a time" in done.screen


def test_several_values(search):
    done = search(
        OPTUNA,
        "returns=several",
        "x=1,2,3",
        "hydra.sweeper.direction=[min,max]",
        "hydra.sweeper.sampler=grid",
        "hydra.sweeper.n_trials=3",
    )
    assert done.status == 0, done.screen
    results = OmegaConf.to_container(OmegaConf.load(done.folder / "optimization_results.yaml"))
    assert sorted(each["params"]["x"] for each in results["solutions"]) == [1, 2]  # 3 is worse than 1 in both


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x=3"], "nothing to search"),
        (["x=interval(3,1)"], "x=interval(3,1): the lower end comes first"),
        (["x=1,2", "hydra.sweeper.n_trials=0"], "n_trials is a number from 1 on, got 0"),
        (["x=1,2", "hydra.sweeper.direction=up"], "min or max, or a list of these, got 'up'"),
        (["x=1,2", "hydra.sweeper.sampler=tpw"], "there is no 'tpw' (did you mean tpe?)"),
        (["x=1,2", "hydra.sweeper.pruner={_target_: optuna.pruners.Nop}"], "optuna.pruners.Nop"),
        (
            ["x=1,2", "hydra.sweeper.pruner={_target_: optuna.pruners.MedianPruner, n: 3}"],
            "unexpected keyword argument 'n'",
        ),
        (["x=interval(1,2)", "hydra.sweeper.sampler=grid"], "x has an interval"),
        (
            ["x=1,2", "returns=several", "hydra.sweeper.direction=[min,max]", "hydra.sweeper.pruner=median"],
            "Pruning goes by one value",
        ),
        (["x=1,2,3", "returns=nothing", "hydra.sweeper.n_trials=9"], "it returned None and not a number"),
        (["x=1,2,3", "fails=a", "hydra.sweeper.n_trials=9"], "kind a is not to my taste"),
    ],
)
def test_bad_input(search, arguments, words):
    done = search(OPTUNA, *arguments)
    assert done.status == 1
    assert words in done.screen.replace("\n", " ")
    assert "Traceback" not in done.screen
    assert not (done.folder / "started").exists() or len(done.started) <= 3


def test_the_report_and_the_search_call_the_same_end_the_better_one(search):
    words = (OPTUNA, "hydra/launcher=lora_local", "x=1,2", "hydra.sweeper.direction=max")
    done = search(*words)
    assert done.status == 1
    assert "hydra.sweeper.direction=max, and the sweep's report takes mode=min" in done.screen
    assert not done.folder.exists()


def test_without_a_pruner_no_job_is_pruned_that_was_begun_with_one(search, tmp_path):
    note = tmp_path / "sweep" / "0" / "trial.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    assert search(OPTUNA, "x=1,2", "hydra.sweeper.n_trials=1").status == 0
    assert not note.exists()


def test_a_folder_of_another_search(search):
    assert search(OPTUNA, "x=1,2", "hydra.sweeper.n_trials=1").status == 0
    other = search(OPTUNA, "x=1,2,3", "hydra.sweeper.n_trials=1")
    assert other.status == 1
    assert "another search" in other.screen
    assert "Choices(texts=('1', '2', '3'))" in other.screen
    assert len(other.started) == 1
