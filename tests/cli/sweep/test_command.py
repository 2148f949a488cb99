"""A job's command, environment and result."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hydra_plugins.lora_lightning.returned import ReturnedValue
from lora_lightning.cli.sweep.command import (
    JobFailed,
    clean_environment,
    job_command,
    job_environment,
    program,
    quoted,
    run_alone,
)
from lora_lightning.errors import LoraConfigError

FOLDER = Path("/runs/it's 1")


@given(st.text(st.characters(exclude_categories=("C",)), min_size=1).filter(lambda text: text == text.strip()))
def test_hydra_reads_a_quoted_value_as_it_is(text):
    value = OverridesParser.create().parse_override(f"hydra.run.dir={quoted(text)}").value()
    assert OmegaConf.create({"dir": str(value)}).dir == text


def test_a_job_is_one_run_in_its_folder(app):
    command = job_command(["x=2", "y=3"], FOLDER, argv=["app.py", "-m", "x=1,2", "y=3"])
    assert command[:2] == (sys.executable, str(app))
    assert command[2:4] == ("x=2", "y=3")
    assert command[4:] == (
        r"hydra.run.dir='/runs/it\'s 1'",
        "++hydra.callbacks.lora_lightning._target_=hydra_plugins.lora_lightning.returned.ReturnedValue",
        "hydra.mode=RUN",
    )


def test_which_configuration_is_read_and_hydras_own_settings_are_those_of_the_sweep(app):
    of_hydra = [
        "hydra/job_logging=none",
        "hydra.verbose=true",
        "+hydra.callbacks.mine._target_=a.B",
        "hydra.job.chdir=true",
    ]
    of_the_sweep = [
        "hydra/launcher=lora_local",
        "+hydra.launcher.n=1",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweep.dir=out",
        "hydra.sweep.subdir=a",
        "hydra.run.dir=b",
        "hydra.mode=MULTIRUN",
    ]
    argv = ["app.py", "-cn", "other", "--config-dir", "more", "-m", *of_the_sweep, "x=1,2", *of_hydra]
    words = job_command(["x=1"], FOLDER, argv=argv)[2:]
    assert list(words[:-3]) == ["--config-name", "other", "--config-dir", "more", *of_hydra, "x=1"]


def test_a_module_is_started_as_one_again(tmp_path, monkeypatch):
    from importlib.machinery import ModuleSpec

    file = tmp_path / "package" / "__main__.py"
    file.parent.mkdir()
    file.touch()
    spec = ModuleSpec("package.__main__", None, origin=str(file))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert program(str(file)) == (sys.executable, "-m", "package")


def test_what_is_no_file_cannot_be_started_again():
    with pytest.raises(LoraConfigError, match=r"'-c' is no file .* run it as `python <file> -m …`"):
        job_command([], FOLDER, argv=["-c", "-m"])


def test_a_job_inherits_nothing_of_a_place_among_processes(monkeypatch):
    before = dict(os.environ)
    others = ["RANK", "LOCAL_RANK", "GLOBAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    others += ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PL_GLOBAL_SEED", "SLURM_NTASKS", "SLURM_PROCID"]
    kept = ["RANKING", "MY_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]
    for name in (*others, *kept):
        monkeypatch.setenv(name, "7")
    clean = clean_environment()
    assert not set(others) & set(clean)
    assert {name: clean[name] for name in kept} == dict.fromkeys(kept, "7")
    assert set(before) - set(clean) <= set(others) | {"PL_SEED_WORKERS"}
    assert job_environment(Path("/runs"), 3) == clean | {"LORA_LIGHTNING_SWEEP": "/runs", "LORA_LIGHTNING_JOB": "3"}


def test_a_job_alone_comes_back_with_its_result(app, tmp_path):
    result = run_alone(["x=3"], tmp_path / "job", sweep=tmp_path, number=4, argv=["app.py", "-m"])
    assert (result["status"], result["value"]) == ("finished", 6)


def test_a_job_alone_that_fails_is_told_with_its_last_lines(app, tmp_path):
    with pytest.raises(
        JobFailed, match=r"(?s)Job 4 \(x=3 fails=3\): exit status 1: ValueError: .*job.log:.*attempt 3 2"
    ):
        run_alone(["x=3", "fails=3"], tmp_path / "job", sweep=tmp_path, number=4, argv=["app.py", "-m"])


class Returned:
    """Calls Hydra's hooks around a job that writes ``own`` as its result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, value, *, own: str | None = None, metric: str | None = None, status=JobStatus.COMPLETED):
        hydra = {"runtime": {"output_dir": str(self.folder)}}
        config = OmegaConf.create({"hydra": hydra, "optimized_metric": metric})
        returned = JobReturn(overrides=["x=1"], status=status)
        returned.return_value = value
        hook = ReturnedValue()
        hook.on_job_start(config)
        if own is not None:
            (self.folder / "result.json").write_text(own)
        hook.on_job_end(config, returned)
        path = self.folder / "result.json"
        return path.read_text() if path.exists() else None


@pytest.fixture
def returned(tmp_path) -> Returned:
    return Returned(tmp_path)


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.5, 1.5), (None, None), (float("nan"), None), ([1, float("nan")], [1, None]), (Path("a"), f"{Path('a')!r}")],
)
def test_what_a_job_returns_is_written(returned, value, written):
    content = json.loads(returned(value))
    assert content.pop("seconds") >= 0
    assert content == {"status": "finished", "overrides": ["x=1"], "value": written}


def test_what_is_returned_is_the_optimized_metric_where_one_is_named(returned):
    content = json.loads(returned(0.5, metric="val/acc"))
    assert (content["value"], content["val/acc"]) == (0.5, 0.5)


def test_a_result_of_the_jobs_own_stays_and_gets_what_it_lacks(returned):
    content = json.loads(returned(1.5, own='{"value": 2, "status": "finished", "accuracy": 0.5}'))
    assert content.pop("seconds") >= 0
    assert content == {"value": 2, "status": "finished", "accuracy": 0.5, "overrides": ["x=1"]}


def test_the_result_of_an_earlier_attempt_does_not_count(returned):
    assert json.loads(returned(ValueError("no luck"), status=JobStatus.FAILED))["status"] == "failed"
    content = json.loads(returned(1.5))
    assert (content["status"], content["value"]) == ("finished", 1.5)


def test_what_is_no_mapping_is_somebody_elses(returned):
    assert returned(1.5, own="[1, 2]") == "[1, 2]"
    assert json.loads(returned(1.5))["value"] == 1.5  # left over, and not written by this attempt


def test_only_the_first_process_writes(returned, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert returned(1.5) is None
