"""The tables, read back and compared with what the folders were made from."""

import csv
import io
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lora_lightning.sweeps.report.collect import collect
from lora_lightning.sweeps.report.tables import as_csv, as_markdown, as_table
from lora_lightning.sweeps.report.values import is_number, typed
from tests.sweeps.report.folders import believable, write_sweep

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=6)
VALUES = (
    st.integers(-100, 100).map(str) | st.floats().map(repr) | st.sampled_from(["true", "null", "a|b", "x,y"]) | WORDS
)
# Names of the table's own columns among them.
KEYS = st.sampled_from(["lora.r", "data.r", "seed", "number", "state", "val_loss", "folder", "+new", "seconds"])
METRICS = st.none() | st.floats(-1e6, 1e6)


@st.composite
def jobs(draw):
    keys = draw(st.lists(KEYS, unique=True, min_size=1, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 6))):
        job = {"overrides": [f"{key}={draw(VALUES)}" for key in keys]}
        status = draw(st.sampled_from(["finished", "finished", "failed", "interrupted", None]))
        if status is not None:
            job["result"] = {"status": status, "val_loss": draw(METRICS), "odd|name": 1, "text": "no number"}
        made.append(job)
    return made


def table_below(markdown, title):
    """Headings and lines of the first table below a title, or none."""
    if f"## {title}\n" not in markdown:
        return [], []
    below = markdown.partition(f"## {title}\n")[2]
    rows = [line for line in below.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return cells[0], cells[2:]


@given(jobs(), st.sampled_from(["min", "max"]))
@settings(max_examples=60, deadline=None)
def test_any_sweep(made, mode):
    with tempfile.TemporaryDirectory() as folder:
        sweep = collect(write_sweep(Path(folder), made, mode=mode))
        rows = list(csv.reader(io.StringIO(as_csv(sweep), newline="")))
        headings, lines = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        assert len(set(headings)) == len(headings)
        assert [int(line["number"]) for line in lines] == list(range(len(made)))
        for line, job in zip(lines, made, strict=True):
            result = job.get("result", {})
            if "val_loss" in line:
                metric = result.get("val_loss")
                assert line["val_loss"] == ("" if metric is None else repr(metric))
            assert "text" not in line
            for key, value in (each.lstrip("+").split("=", 1) for each in job["overrides"]):
                if key in sweep.keys:
                    cell, meant = line.get(f"{key} (setting)", line.get(key)), typed(value)
                    if is_number(meant):
                        assert typed(cell) == meant or (math.isnan(typed(cell)) and math.isnan(meant))
                    else:
                        assert cell == {"None": "null", "True": "true"}.get(str(meant), str(meant))
        _check_markdown(as_markdown(sweep), made, mode)
        Console(file=io.StringIO(), width=200).print(as_table(sweep))


def _check_markdown(markdown, made, mode):
    finished = {
        n: job["result"]["val_loss"] for n, job in enumerate(made) if job.get("result", {}).get("status") == "finished"
    }
    headings, lines = table_below(markdown, "Jobs")
    assert len(lines) == len(finished)
    assert all(len(line) == len(headings) for line in lines)
    if finished:
        ranked = [finished[int(line[headings.index("job")])] for line in lines]
        finite = [value for value in ranked if value is not None]
        assert finite == sorted(finite, reverse=mode == "max")
        assert ranked == finite + [None] * (len(ranked) - len(finite))
        assert [line.count("**best**") for line in lines] == [bool(finite) and not n for n in range(len(lines))]
    others = sum(len(table_below(markdown, title)[1]) for title in ("Failed", "Not finished"))
    assert others == len(made) - len(finished)


def test_mean_and_standard_deviation_are_numpys(tmp_path):
    values = np.random.default_rng(0).normal(2.5, 0.1, (3, 2, 4))
    made = [
        {"overrides": [f"lora.r={r}", f"learning_rate={lr}", f"seed={s}"], "result": {"val_loss": values[i, j, s]}}
        for i, r in enumerate((4, 8, 16))
        for j, lr in enumerate(("1e-3", "3e-4"))
        for s in range(4)
    ]
    markdown = as_markdown(collect(write_sweep(tmp_path, made)))
    headings, lines = table_below(markdown, "Settings over seed")
    assert headings == ["", "r", "learning_rate", "val_loss", "n", "jobs"]
    means, deviations = values.mean(-1).ravel(), values.std(-1, ddof=1).ravel()
    for line, index in zip(lines, means.argsort(), strict=True):
        assert line[1:3] == [str((4, 8, 16)[index // 2]), ("0.001", "0.0003")[index % 2]]
        assert line[3] == f"{means[index]:.4f} ± {deviations[index]:.2g}"
        assert line[4:] == ["4", ", ".join(str(4 * index + seed) for seed in range(4))]
    assert lines[0][0] == "**best**"


def test_a_setting_that_diverged_with_one_seed_stands_behind(tmp_path):
    made = [
        {"overrides": [f"lora.r={r}", f"seed={s}"], "result": {"val_loss": value}}
        for r, seeds in {4: (1.0, None), 8: (2.0, 2.5), 16: (None, None)}.items()
        for s, value in enumerate(seeds)
    ]
    made.append({"overrides": ["lora.r=32", "seed=0"], "result": {"status": "failed"}})
    _, lines = table_below(as_markdown(collect(write_sweep(tmp_path, made))), "Settings over seed")
    assert [line[:4] for line in lines] == [
        ["**best**", "8", "2.2500 ± 0.35", "2"],
        ["", "4", "1.0000", "1"],
        ["", "16", "not finite", "0"],
    ]


@pytest.fixture
def mixed(tmp_path):
    made = [believable([f"lora.r={r}"]) for r in (4, 8, 16, 32, 64)]
    made[1] = {"overrides": made[1]["overrides"], "result": {"status": "failed"}, "log": "ValueError: odd | value\n"}
    made[2]["result"]["ended_by"] = "pruned at step 10"
    made[3] = {"overrides": made[3]["overrides"], "progress": {"step": 5, "steps": 30}}
    made.append({"overrides": made[0]["overrides"], "same_as": 0})
    return collect(write_sweep(tmp_path / "swept", made))


def test_what_has_not_finished_is_listed_with_its_reason(mixed):
    markdown = as_markdown(mixed)
    assert table_below(markdown, "Stopped by the sweep")[1] == [
        ["2", "r=16", f"{mixed.rows[2].metric:.4f}", "pruned at step 10"]
    ]
    assert table_below(markdown, "Failed")[1] == [["1", "r=8", r"ValueError: odd \| value"]]
    assert table_below(markdown, "Not finished")[1] == [["3", "r=32", "at step 5 of 30"]]
    assert table_below(markdown, "Equal settings")[1] == [["5", "r=4", "as job 0"]]
    assert "6 jobs: 2 finished, 1 failed, 1 stopped by the sweep, 1 unfinished, 1 not run" in markdown
    assert "1 is missing here" in markdown


def test_the_command_stands_on_top_and_pictures_below(mixed):
    markdown = as_markdown(mixed, ["plots/val_loss_by_r.png"])
    assert markdown.startswith("# Sweep swept\n\n```sh\npython scripts/train.py -m experiment=smoke lora.r=4,8\n```\n")
    assert markdown.endswith("![val loss by r](plots/val_loss_by_r.png)\n")


def test_the_adapter_is_found_where_the_folder_was_moved(mixed, tmp_path):
    before = as_csv(mixed)
    mixed.folder.rename(tmp_path / "elsewhere")
    assert as_csv(collect(tmp_path / "elsewhere")) == before
    assert ",0/adapter," in before


def test_on_the_screen_the_best_of_many(tmp_path):
    sweep = collect(write_sweep(tmp_path, [believable([f"lora.r={r}"]) for r in range(1, 31)]))
    console = Console(file=io.StringIO(), width=120)
    console.print(as_table(sweep, most=5))
    shown = console.file.getvalue()
    assert "… and 25 more in sweep.md" in shown
    assert [line.split()[0] for line in shown.splitlines()[2:4]] == ["best", str(sweep.ranked[1].number)]


def test_without_a_metric_jobs_stand_in_their_order(tmp_path):
    made = [{"overrides": [f"lora.r={r}", f"seed={r}"], "result": {"val_loss": 5.0 - r}} for r in (1, 2, 3)]
    markdown = as_markdown(collect(write_sweep(tmp_path, made, metric=None)))
    headings, lines = table_below(markdown, "Jobs")
    assert [line[headings.index("job")] for line in lines] == ["0", "1", "2"]
    assert "best" not in markdown.lower().partition("## pictures")[0]


def test_figures_of_a_shared_process_are_said_to_be(tmp_path):
    made = [believable([f"lora.r={r}"], shared_with=others) for r, others in ((4, 1), (8, 1), (16, 0))]
    markdown = as_markdown(collect(write_sweep(tmp_path, made)))
    assert "Seconds and memory are those of a process that trained several at once: 0, 1." in markdown
    assert "at once" not in as_markdown(collect(write_sweep(tmp_path, [believable(["lora.r=4"], shared_with=0)])))
