"""The benchmark of sweeps: what it compares, what it tells, and that it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from benchmarks import packed, packed_page
from benchmarks.sweep_folder import compared, jobs_of
from benchmarks.tree import TreeMemory


def job(val_loss: float, *losses: float, ended_by: str | None = None, **more):
    return {
        "overrides": ["trainer.max_steps=2", f"lora.r={val_loss:g}"],
        "status": "finished",
        "ended_by": ended_by,
        "val_loss": val_loss,
        "losses": {str(step): loss for step, loss in enumerate(losses)},
        **more,
    }


SOLO = {"0": job(2.0, 5.0, 4.0), "1": job(1.0, 5.0, 3.0), "2": job(3.0, 6.0, 5.0)}


def case(seconds: float, pss: int, jobs=SOLO, **more):
    return {"seconds": seconds, "memory": {"pss": pss, "rss": 2 * pss}, "jobs": jobs, "best": "1", **more}


def test_losses_are_compared_step_by_step_and_the_best_is_one_that_was_trained_to_the_end():
    stopped = {"0": job(0.1, 5.5, ended_by="halving at step 1"), "1": job(1.25, 5.0, 3.25), "2": job(3.0, 6.0, 5.0)}
    assert compared(stopped, SOLO) == {"best": "1", "difference": 0.5, "val_difference": 0.25}
    assert compared(SOLO, None) == {"best": "1"}
    failed = {"0": job(2.0, 5.0, 4.0), "1": job(1.0, 5.0, 3.0, status="failed")}
    assert compared(failed, SOLO)["best"] == "0"


def test_nothing_in_common_is_no_agreement():
    with pytest.raises(RuntimeError, match="job 0"):
        compared({"0": job(2.0)}, SOLO)


def test_jobs_are_read_from_a_sweeps_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [{"number": 7, "overrides": ["x=1"], "folder": "a"}]}))
    (tmp_path / "a" / "result.json").write_text('{"status": "finished", "val_loss": 2.5}')
    (tmp_path / "a" / "metrics.csv").write_text("step,train_loss,val_loss\n0,3.5,\n0,,9.0\n1,2.0,\n")
    told = jobs_of(tmp_path)["7"]
    assert told["losses"] == {"0": 3.5, "1": 2.0}
    assert told["overrides"] == ["x=1"]


def results():
    cases = {
        "serial": case(100.0, 10 * 2**20),
        "all": case(80.0, 40 * 2**20, difference=0.0),
        "packed": case(45.0, 12 * 2**20, difference=1e-6),
        "halving": case(30.0, 11 * 2**20, difference=2e-6),
    }
    about = {"cpu": "some", "cores": 2, "python": "3.11", "date": "today"} | dict.fromkeys(
        ("torch", "transformers", "lightning"), "1"
    )
    return {"machine": about, "rows": {"1x48": {"jobs": 3, "cases": cases}}}


def test_table_tells_ratios_beside_targets():
    lines = packed_page.table(results()).splitlines()
    assert lines[0] == "3 jobs, 1 × 48 tokens a step:"
    assert (
        "| packed | 45 s | 0.45 | ≤ 0.5 | 12 MB | 0.30 | 24 MB | 0.30 | ≤ 0.3 | 1.0e-06 | lora.r=1: 1.0000 |" in lines
    )
    assert any("30 s | 0.30 | ≤ 0.35" in line for line in lines)


def test_page_is_filled_between_its_marks(tmp_path):
    document, file = tmp_path / "sweeps.md", tmp_path / "packed.json"
    document.write_text("Before.\n<!-- packed -->\nold\n<!-- end of packed -->\nAfter.\n")
    packed_page.write(document, file)
    assert packed_page.NOT_RUN in document.read_text()
    file.write_text(json.dumps(results()))
    packed_page.write(document, file)
    text = document.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "some, 2 cores" in text
    assert "old" not in text


def test_parts_of_a_run_join_those_of_the_same_machine_only(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "RESULTS", tmp_path / "packed.json")
    earlier = results()
    packed.RESULTS.write_text(json.dumps(earlier))
    found = {"1x48": {"jobs": 3, "cases": {"packed": case(40.0, 1)}}}
    joined = packed.merged(found, earlier["machine"] | {"date": "later"})["rows"]["1x48"]["cases"]
    assert joined["packed"]["seconds"] == 40.0
    assert joined["serial"]["seconds"] == 100.0
    assert joined["packed"]["difference"] == 0.0  # from the solo runs of that time
    elsewhere = packed.merged(found, earlier["machine"] | {"cpu": "another"})
    assert list(elsewhere["rows"]["1x48"]["cases"]) == ["packed"]


def test_memory_is_that_of_the_whole_tree():
    child = (
        "import time; x = bytearray(60 * 2**20); x[::4096] = b'x' * len(x[::4096]); print(flush=True); time.sleep(3)"
    )
    code = (
        "import subprocess, sys; p = [subprocess.Popen([sys.executable, '-c', sys.argv[1]]) for _ in '12']; "
        "[each.wait() for each in p]"
    )
    process = subprocess.Popen([sys.executable, "-c", code, child], stdout=subprocess.DEVNULL)
    with TreeMemory(process.pid) as memory:
        process.wait()
    told = memory.told()
    assert told["processes"] == 3
    assert 120 * 2**20 < told["pss"] <= told["rss"] < 240 * 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("warm_starts")
def test_it_runs(tmp_path, capsys):
    assert packed.main(["--tiny", "--jobs", "2", "--only", "serial", "packed", "--keep", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    farthest = re.search(r"\| packed \|.*\| (\S+e\S+) \|", shown)
    assert float(farthest[1]) < 1e-4
    assert len(jobs_of(tmp_path / "tiny" / "packed")) == 2


def test_figures_of_a_part_are_not_written(capsys):
    with pytest.raises(SystemExit):
        packed.main(["--tiny", "--write"])
    assert "whole grid" in capsys.readouterr().err
