"""Advice from a run's folder alone, and what is left of it for people."""

import json

import pytest
from rich.console import Console

from lora_lightning import AdapterError
from lora_lightning.reports.advice import Advice, advice_table, advise, as_markdown, evidence_of, leave_advice
from lora_lightning.reports.insight.rows import InsightRow, append_rows


def layers(step, r=2, half=0.4):
    return [
        InsightRow(step, f"layers.{block}.q_proj", r, r, r, 1.2, 1.0, r, 0.05, 0.1, 0.1, 1000, half)
        for block in range(4)
    ]


@pytest.fixture
def folder(tmp_path):
    """What a resumed run of a rank that is too small leaves."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "metrics-1.csv").write_text("step,train_loss,val_loss\n9,4.0,\n19,3.5,\n19,,3.4\n24,9.9,\n")
    (run / "metrics.csv").write_text("step,train_loss,val_loss\n24,3.1,\n39,2.9,\n39,,3.0\n")
    append_rows(run / "insight.csv", [*layers(20, half=0.1), *layers(40)])
    (run / "config.yaml").write_text("learning_rate: 1.0e-03\nlora:\n  r: 2\n  lora_alpha: 4\n")
    result = {"status": "finished", "steps": 45, "val_loss_before": 4.5, "val_loss": 2.8, "overrides": ["lora.r=2"]}
    (run / "result.json").write_text(json.dumps(result))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "task_type": "CAUSAL_LM"}))
    return run


def test_what_a_folder_says(folder):
    evidence = evidence_of(folder)
    assert evidence.trained == [(10, 4.0), (20, 3.5), (25, 3.1), (40, 2.9)]  # what was done again is not counted
    assert evidence.validated == [(0, 4.5), (20, 3.4), (40, 3.0), (45, 2.8)]
    assert (evidence.r, evidence.rate, len(evidence.adapted)) == (2, ("learning_rate", 1e-3), 4)
    (advice,) = advise(folder)
    assert (advice.rule, advice.override) == ("rank saturated", "lora.r=8 lora.lora_alpha=16")


def test_from_the_adapter_alone_the_rank_is_known(folder):
    for name in ("config.yaml", "result.json", "metrics.csv", "metrics-1.csv"):
        (folder / name).unlink()
    (advice,) = advise(folder)
    assert advice.override == "lora.r=8"


def test_what_is_left_at_the_end(folder):
    given = json.loads((folder / "result.json").read_text()) | {"overrides": ["lora.r=2", "lora.lora_alpha=4"]}
    (folder / "result.json").unlink()  # not yet written then
    (advice,) = leave_advice(folder, given)
    assert advice.override == "lora.r=8 lora.lora_alpha=16"
    page = (folder / "advice.md").read_text()
    assert page.startswith("# Advice\n\n## Rank saturated (hint)\n\nIn 4 of 4 layers")
    assert "```sh\nlora.r=8 lora.lora_alpha=16\n```" in page
    assert "- lesser half: 0.4" in page
    json.dumps(advice.to_dict())


def test_a_run_that_measured_nothing_is_not_judged(tmp_path):
    (tmp_path / "config.yaml").write_text("lora: {r: 8}\n")
    assert leave_advice(tmp_path, {"status": "finished"}) is None
    assert not (tmp_path / "advice.md").exists()


def test_a_run_does_not_fail_for_its_advice(folder):
    (folder / "insight.csv").write_text("something else\n1\n")
    with pytest.warns(UserWarning, match=r"No advice on the run .* is no insight\.csv"):
        assert leave_advice(folder, {}) is None


@pytest.mark.parametrize("content", ["metrics.csv", "result.json", "adapter/adapter_config.json", "config.yaml"])
def test_files_that_cannot_be_read_are_named(folder, content):
    (folder / content).write_text("step,train_loss\n1,abc\n: [\n")
    with pytest.raises(AdapterError, match=r"a file of .*run cannot be read"):
        advise(folder)


def test_what_is_no_run_is_told(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AdapterError, match=r"is no run's folder.*There is: notes\.txt"):
        advise(tmp_path)
    with pytest.raises(AdapterError, match="There is: nothing"):
        advise(tmp_path / "none")


def test_on_the_screen():
    console = Console(width=80, force_terminal=False)
    given = [Advice("rank unused", "hint", "Half of [r] would do.", {"r": 64, "steps": [1, 2]}, "lora.r=32")]
    with console.capture() as capture:
        console.print(advice_table(given))
        console.print(advice_table([]))
    shown = capture.get()
    assert "Rank unused  Half of [r] would do.\n             lora.r=32" in shown
    assert "Nothing in the curves" in shown
    assert "- steps: 1, 2" in as_markdown(given)
    assert "Nothing in the curves" in as_markdown([])
