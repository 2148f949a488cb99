import json
from pathlib import Path

import pytest

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.report.collect import check_metric, collect
from tests.sweeps.report.folders import believable, write_job, write_sweep


def states(sweep):
    return {row.number: row.state for row in sweep.rows}


def test_states_and_reasons(tmp_path):
    settings = [[f"lora.r={rank}"] for rank in range(1, 10)]
    told = "step 1\nConfiguration ─────\nlora.r must be at least 1, got 0\n─────\n"
    crash = "50%|###\r60%|####\nTraceback (most recent call last):\n  File\ntorch.OutOfMemoryError: too much\nbye\n"
    more = [
        {"result": {"val_loss": 1.0, "ended_by": "early stopping"}},
        {"result": {"val_loss": 1.0, "ended_by": "pruned at step 10"}},
        {"result": {"val_loss": 1.0, "ended_by": "halving at step 5, place 3 of 4"}},
        {"result": {"status": "failed"}, "log": told},
        {"result": {"status": "failed"}, "log": crash},
        {"result": {"status": "failed"}},
        {"result": {"status": "interrupted", "steps": 7}},
        {"progress": {"step": 5, "steps": 30}},
        {},
    ]
    sweep = collect(write_sweep(tmp_path, [{"overrides": own} | job for own, job in zip(settings, more, strict=True)]))
    assert [row.state for row in sweep.rows] == [
        *("finished", "stopped", "stopped", "failed", "failed", "failed", "interrupted", "unfinished", "not started")
    ]
    assert [row.reason for row in sweep.rows[3:8]] == [
        "lora.r must be at least 1, got 0",
        "torch.OutOfMemoryError: too much",
        "nothing in its log says why",
        "at step 7",
        "at step 5 of 30",
    ]
    assert sweep.best.number == 0  # of equal metrics that of the job which was not stopped


def test_only_what_differs_was_swept(tmp_path):
    sweep = collect(write_sweep(tmp_path, [believable([f"lora.r={r}", "learning_rate=1e-3"]) for r in (4, 8)]))
    assert sweep.keys == ("lora.r",)
    assert [row.settings for row in sweep.rows] == [{"lora.r": 4}, {"lora.r": 8}]


def test_a_single_job_shows_all_that_was_set(tmp_path):
    assert collect(write_sweep(tmp_path, [believable(["lora.r=4"])])).keys == ("experiment", "lora.r")


def test_what_a_job_was_not_given_is_in_its_configuration(tmp_path):
    """The first stage of a search says nothing of a rank that the second one sweeps."""
    config = "lora:\n  r: 16\n  target_modules: [q, v]\nlearning_rate: 1e-3\n"
    jobs = [
        {"overrides": ["learning_rate=1e-4"], "result": {"val_loss": 1.0}, "config": config},
        {"overrides": ["lora.r=8", "lora.target_modules=[q]"], "result": {"val_loss": 1.0}, "config": config},
        {"overrides": ["lora=dora"], "result": {"val_loss": 1.0}, "config": "lora: {r: \n"},  # broken off
    ]
    rows = collect(write_sweep(tmp_path, jobs)).rows
    assert rows[0].settings == {"learning_rate": 1e-4, "lora.r": 16, "lora.target_modules": "['q', 'v']"}
    assert rows[1].settings == {"learning_rate": 1e-3, "lora.r": 8, "lora.target_modules": "[q]"}
    assert rows[2].settings == {"lora": "dora"}


def test_a_result_of_another_job_is_none(tmp_path):
    folder = write_sweep(tmp_path, [believable(["lora.r=4"]), believable(["lora.r=8"])])
    (folder / "1" / "result.json").write_text(json.dumps({"status": "finished", "overrides": ["lora.r=64"]}))
    assert states(collect(folder)) == {0: "finished", 1: "not started"}


def test_best_is_the_finite_one_of_the_mode(tmp_path):
    values = [3.0, None, 1.0, 2.0]
    folder = write_sweep(
        tmp_path, [{"overrides": [f"lora.r={n}"], "result": {"val_loss": v}} for n, v in enumerate(values, 1)]
    )
    assert [row.number for row in collect(folder).ranked] == [2, 3, 0, 1]
    assert [row.number for row in collect(folder, mode="max").ranked] == [0, 3, 2, 1]
    with pytest.raises(LoraConfigError, match="mode must be min or max, got 'least'"):
        collect(folder, mode="least")


def test_infinity_and_nan_are_no_metric(tmp_path):
    folder = write_sweep(
        tmp_path,
        [{"overrides": [f"x={n}"], "result": {"val_loss": v}} for n, v in enumerate([float("nan"), -float("inf"), 2])],
    )
    assert [row.number for row in collect(folder).ranked] == [2, 0, 1]


def plain_multirun(folder: Path, names, **result):
    for rank, name in enumerate(names, 4):
        write_job(folder / name, [f"lora.r={rank}"], {"result": {"val_loss": 10.0 - rank} | result, "config": "{}"})
        (folder / name / ".hydra").mkdir()
        (folder / name / ".hydra" / "overrides.yaml").write_text(f"- lora.r={rank}\n")


def test_a_plain_multirun_is_a_sweep_by_its_jobs(tmp_path):
    plain_multirun(tmp_path, ["0", "1", "10"])
    (tmp_path / "notes").mkdir()
    sweep = collect(tmp_path, metric="val_loss")
    assert {row.number: row.settings for row in sweep.rows} == {0: {"lora.r": 4}, 1: {"lora.r": 5}, 10: {"lora.r": 6}}
    assert (sweep.best.number, sweep.mode, sweep.command) == (10, "min", ())


def test_folders_named_by_their_overrides_are_numbered(tmp_path):
    plain_multirun(tmp_path, ["lora.r=4", "lora.r=5"], value=1.0)
    sweep = collect(tmp_path)
    assert [row.number for row in sweep.rows] == [0, 1]
    assert sweep.metric == "value"  # nobody says what: it is what the script has returned


def test_metric_and_mode_of_a_plain_multirun_are_in_its_configuration(tmp_path):
    plain_multirun(tmp_path, ["0", "1"], val_f1=0.5)
    (tmp_path / "0" / "config.yaml").write_text("optimized_metric: val_f1\nsweep:\n  mode: max\n")
    sweep = collect(tmp_path)
    assert (sweep.metric, sweep.mode) == ("val_f1", "max")


@pytest.mark.parametrize(("name", "what"), [("", "no folder in it has result.json"), ("none", "there is no such")])
def test_what_is_no_sweep_is_told(tmp_path, name, what):
    with pytest.raises(LoraConfigError, match=what) as raised:
        collect(tmp_path / name)
    assert "outputs/<name>/sweep_" in str(raised.value)


def test_a_metric_that_nobody_reports_names_those_there_are(tmp_path):
    folder = write_sweep(tmp_path, [believable(["lora.r=4"])], metric="val_los")
    with pytest.raises(LoraConfigError, match=r"reports 'val_los' \(did you mean val_loss\?\)") as raised:
        check_metric(collect(folder))
    assert "perplexity, seconds, seed, steps, trainable_parameters, val_loss" in str(raised.value).replace(
        "peak_memory_bytes, ", ""
    )


def test_a_metric_that_is_never_finite_is_reported(tmp_path):
    check_metric(collect(write_sweep(tmp_path / "nan", [believable(["lora.r=4"], val_loss=None)])))
    check_metric(collect(write_sweep(tmp_path / "none", [{"overrides": ["lora.r=4"]}])))  # nothing has finished


def test_seeds_are_no_setting(tmp_path):
    jobs = [believable([f"lora.r={r}", f"seed={s}"]) for r in (4, 8) for s in (0, 1)]
    sweep = collect(write_sweep(tmp_path, jobs))
    assert (sweep.setting_keys, sweep.seed_keys) == (("lora.r",), ("seed",))
