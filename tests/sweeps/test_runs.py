"""What can be read of a job from its folder, whole or not at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.sweeps.runs import SWEEP, Job, Work, current_sweep, is_finished, read_json, result_of


@pytest.fixture
def job(tmp_path):
    return Job(3, ("lora.r=8", "seed=1"), tmp_path)


def _leave(job, **content):
    (job.folder / "result.json").write_text(json.dumps(content))


def test_a_finished_job_is_one_with_its_own_whole_result(job):
    assert not is_finished(job)
    _leave(job, status="finished", overrides=["seed=1", "hydra.x=2", "lora.r=8"])
    assert is_finished(job)
    _leave(job, status="interrupted", overrides=["lora.r=8", "seed=1"])
    assert not is_finished(job)
    assert result_of(job)["status"] == "interrupted"


@pytest.mark.parametrize("overrides", [["lora.r=16", "seed=1"], [], None])
def test_the_result_of_another_job_is_none(job, overrides):
    _leave(job, status="finished", overrides=overrides)
    assert result_of(job) is None


@given(st.integers(0, 40))
def test_a_result_that_is_broken_off_is_none(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("run") / "result.json"
    whole = json.dumps({"status": "finished", "overrides": ["a=1"]})
    path.write_text(whole[:length])
    assert read_json(path) is None
    path.write_text("[1]")
    assert read_json(path) is None


def test_a_process_knows_its_sweep(monkeypatch, tmp_path):
    monkeypatch.delenv(SWEEP, raising=False)
    assert current_sweep() is None
    monkeypatch.setenv(SWEEP, str(tmp_path))
    assert current_sweep() == tmp_path


def test_work_needs_what_its_largest_job_needs(job, tmp_path):
    assert Work((job, Job(4, (), tmp_path, devices=2)), (), job.log).devices == 2
