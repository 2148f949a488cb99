"""`hydra/sweeper=lora_stages` in somebody's app, under Hydra's own launcher."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

STAGES = "hydra/sweeper=lora_stages"


def stages(text):
    return (STAGES, f"hydra.sweeper.stages={text}")


def test_each_stage_has_the_best_of_those_before(search):
    done = search(*stages("[{y: [1e-4, 1e-3, 0.01]}, {x: [0.0, 1.0, 2.0], kind: 'a,b'}, {r: [16, 24]}]"), "alpha=24")
    assert done.status == 0, done.screen
    started = [" ".join(overrides) for _, *overrides in done.started]
    assert started[:3] == ["alpha=24 y=0.0001", "alpha=24 y=0.001", "alpha=24 y=0.01"]
    # The one with the values that the first stage had by default is known.
    assert started[3:8] == [f"alpha=24 y=0.001 x={x} kind={k}" for x in ("0.0", "1.0", "2.0") for k in "ab"][1:]
    assert started[8:] == ["alpha=24 y=0.001 x=2.0 kind=b r=16", "alpha=24 y=0.001 x=2.0 kind=b r=24"]
    assert [int(job) for job, *_ in done.started] == list(range(10))
    assert "Stage 1 of 3: best 21, job 1: y=0.001" in done.screen
    assert "Stage 3 of 3: best 0, job 9: y=0.001 x=2.0 kind=b r=24" in done.screen
    assert OmegaConf.to_container(OmegaConf.load(done.folder / "optimization_results.yaml")) == {
        "name": "stages",
        "best_params": {"y": 0.001, "x": 2.0, "kind": "b", "r": 24},
        "best_value": 0.0,
    }


def test_what_is_typed_comes_before_the_stages(search):
    done = search(*stages("[{x: [0, 1]}, {r: [4, 8], y: [0.1, 0.01]}, {kind: [a, b]}]"), "x=2,3", "r=16", "kind=b")
    assert done.status == 0, done.screen
    started = [" ".join(overrides) for _, *overrides in done.started]
    assert started == ["r=16 kind=b x=2", "r=16 kind=b x=3", "r=16 kind=b x=2 y=0.1"]  # y=0.01 is the default


def test_keys_that_follow_others_can_be_held(search):
    done = search(*stages("[{r: [8, 16, 32]}]"), "alpha=${r}", "hydra.sweeper.hold=[alpha]")
    assert done.status == 0, done.screen
    assert [overrides for _, *overrides in done.started] == [[f"alpha={r}", f"r={r}"] for r in (8, 16, 32)]
    done = search(*stages("[{r: [8, 16, 32]}]"), "hydra.sweeper.hold=[alpha]", folder="held")
    assert [overrides for _, *overrides in done.started] == [["alpha=16", f"r={r}"] for r in (8, 16, 32)]
    assert "best 6, job 1: r=16" in done.screen


def test_the_largest_may_be_the_best(search):
    done = search(*stages("[{x: [0, 2, 5]}]"), "hydra.sweeper.direction=max")
    assert "best 19, job 2: x=5" in done.screen


def test_a_setting_that_there_is_not_is_told_with_the_nearest(search):
    done = search(*stages("[{x: [0, 1]}]"), "+hydra.sweeper.holt=[x]")
    assert done.status == 1, done.screen
    assert "hydra.sweeper has no setting 'holt'" in done.screen
    assert "hold" in done.screen
    assert "Traceback" not in done.screen


def test_a_job_that_fails_is_not_the_best(search):
    done = search(*stages("[{kind: [a, b]}, {x: [1, 2]}]"), "fails=b")
    assert done.status == 0, done.screen
    assert "Failed: job 1: kind=b: kind b is not to my taste" in done.screen
    assert [" ".join(overrides) for _, *overrides in done.started][2:] == ["fails=b kind=a x=1", "fails=b kind=a x=2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra.sweeper.stages=[]"], "there is no stage to run"),
        (["hydra.sweeper.stages=[{x: [1, 2]}]", "y=1,2"], "y has several values, and no stage"),
        (["hydra.sweeper.stages=[{x: 'interval(1,2)'}]"], "x has an interval"),
        (["hydra.sweeper.stages=[{x: 'range(2,1)'}]"], "no number lies in this range"),
        (["hydra.sweeper.stages=[{x: [1, 2]}]", "hydra.sweeper.hold=[beta]"], "hold names beta, which has no value"),
        (["hydra.sweeper.stages=[{x: [1, 2]}]", "hydra.sweeper.direction=up"], "min or max, got 'up'"),
        (["hydra.sweeper.stages=[{x: [1, 2]}, {y: [1, 2]}]", "fails=a"], "2 of the 2 jobs of this stage failed"),
    ],
)
def test_bad_input(search, arguments, words):
    done = search(STAGES, *arguments)
    assert done.status == 1
    assert words in done.screen
    assert "Traceback" not in done.screen
