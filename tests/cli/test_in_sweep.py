"""What a run does otherwise as a job of a sweep, and that it trains the same."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from lora_lightning.cli.build import can_be_kept, make_data
from lora_lightning.cli.in_sweep import as_job, short_name
from lora_lightning.cli.train import main
from lora_lightning.sweeps import manifest
from lora_lightning.sweeps.runs import JOB, SWEEP
from lora_lightning.tasks import ModelConfig, load_tokenizer

FAST = (
    "experiment=smoke",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "data.rows=32",
    "data.val_rows=8",
    "callbacks.samples.every_validation=false",
)


@pytest.fixture(scope="module", autouse=True)
def _cache(demo_cache):
    return demo_cache


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The folder of a sweep that this process is a job of."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    monkeypatch.setenv(SWEEP, str(folder))
    monkeypatch.setenv(JOB, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = [
        manifest.Entry(0, ("lora.r=4", "seed=1"), "0"),
        manifest.Entry(1, ("lora.r=8", "seed=1"), "1"),
    ]
    about = {"script": "train.py", "config_name": "train", "metric": "val_loss", "mode": "min"}
    manifest.Manifest(
        "ranks", (), overrides=(), sweeper="", launcher="", started=0.0, version="", jobs=tuple(entries), **about
    ).write(folder)
    return folder


def _files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_job_leaves_figures_and_no_reports_and_trains_the_same(call, sweep, tmp_path, monkeypatch):
    job = call(main, *FAST, f"hydra.run.dir={sweep}/1")
    with monkeypatch.context() as patch:
        patch.delenv(SWEEP)
        alone = call(main, *FAST, f"hydra.run.dir={tmp_path}/alone")
    assert (job.status, alone.status) == (0, 0), job.stderr + alone.stderr
    reports = {"samples.md", "loss.png", "insight.csv", "insight.png", "about.json", "report.html"}
    assert reports <= _files(tmp_path / "alone") - _files(sweep / "1")
    assert _files(sweep / "1") - _files(tmp_path / "alone") == {"progress.json"}
    of_job, of_run = (json.loads((each / "result.json").read_text()) for each in (sweep / "1", tmp_path / "alone"))
    for key in ("status", "ended_by", "steps", "val_loss", "val_loss_before", "trainable_parameters"):
        assert of_job[key] == of_run[key]
    assert (tmp_path / "cache" / "lora_lightning" / "data").is_dir()


def test_the_log_of_a_job_has_short_lines_and_no_bars(call, sweep):
    job = call(main, *FAST, f"hydra.run.dir={sweep}/1")
    lines = job.stdout.splitlines()
    assert len(lines) <= 6, job.stdout
    assert any(line.startswith("step 4/4, loss ") for line in lines)
    assert "\r" not in job.stdout
    assert "%|" not in job.stdout + job.stderr


def test_reports_are_made_where_they_are_asked_for(call, sweep):
    job = call(main, *FAST, f"hydra.run.dir={sweep}/1", "sweep.reports=true")
    assert {"samples.md", "loss.png", "report.html", "progress.json"} <= _files(sweep / "1")
    assert "One training example" in job.stdout


def test_runs_of_a_sweep_are_a_group_of_wandbs_with_short_names(composed, sweep):
    cfg = composed("experiment=smoke", "logger=wandb", f"paths.output_dir={sweep}/1")
    wandb = as_job(cfg).logger.wandb
    assert (wandb.group, wandb.name, wandb.job_type) == ("ranks", "r=8", "train")
    assert cfg.logger.wandb.group is None  # what Hydra has is left as it is
    own = composed("logger=wandb", "logger.wandb.group=mine", "logger.wandb.name=x", f"paths.output_dir={sweep}/1")
    assert (as_job(own).logger.wandb.group, as_job(own).logger.wandb.name) == ("mine", "x")
    assert short_name(sweep, sweep / "7") is None


def test_alone_nothing_is_otherwise(composed):
    cfg = composed("experiment=smoke", "logger=wandb")
    assert as_job(cfg) is cfg


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["data=tiny_text"], True),
        (["data=jsonl", "data.path=x.jsonl"], True),
        (["data=jsonl", "data.path=x.jsonl", "data.streaming=true"], False),
        (["data=tiny_text", "data._target_=lora_lightning.data.module.DataModule"], False),
    ],
)
def test_rows_that_can_be_kept(composed, overrides, kept):
    assert can_be_kept(composed("experiment=smoke", *overrides)) is kept


@pytest.mark.parametrize(
    ("cache", "keep", "expected"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("true", False, True),
        ("false", True, False),
        ("here", False, "here"),
    ],
)
def test_auto_keeps_rows_in_a_sweep_and_what_was_said_holds(composed, cache, keep, expected):
    cfg = composed("experiment=smoke", f"data.cache={cache}")
    tokenizer = load_tokenizer(ModelConfig.of(OmegaConf.to_container(cfg.model, resolve=True)))
    assert make_data(cfg, tokenizer, keep=keep).cache == expected


def test_a_data_set_that_knows_no_cache_is_left_alone(composed):
    cfg = composed("experiment=smoke", "data._target_=types.SimpleNamespace", "~data.cache")
    assert not hasattr(make_data(cfg, None, keep=True), "cache")
