"""What is on the screen while a sweep runs, in a terminal and in a file, and what is left of failed jobs at its end."""

from __future__ import annotations

import io
import json
import os
import pickle
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_lightning.sweeps.devices import Pool, Slot
from lora_lightning.sweeps.engine import Outcome, run
from lora_lightning.sweeps.runs import Job, Work
from lora_lightning.sweeps.table import LiveTable, Row, chosen, clock, failures, time_left

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def screen():
    """screen(height): a terminal of 100 columns, and what has been written to it."""

    def make(height=30, terminal=True):
        out = io.StringIO()
        console = Console(file=out, width=100, height=height, force_terminal=terminal, color_system=None)
        return console, lambda: ESCAPES.sub("", out.getvalue())

    return make


@pytest.fixture
def jobs(tmp_path):
    def make(number):
        made = [Job(n, (f"lora.r={2**n}", "seed=1"), tmp_path / str(n)) for n in range(number)]
        for job in made:
            job.folder.mkdir()
        return made

    return make


def _works(jobs):
    return [Work((job,), (), job.log) for job in jobs]


def _progress(job, **more):
    content = {"step": 3, "steps": 10, "loss": 1.25, "val_loss": None, "seconds": 6.0, "seconds_left": 14.0}
    (job.folder / "progress.json").write_text(json.dumps(content | {"time": time.time()} | more))


def test_one_table_of_all_jobs(jobs, screen):
    console, shown = screen()
    four = jobs(5)
    table = LiveTable(console)
    table.begin(_works(four), Pool(2, gpus=(), cores=2))
    for work in _works(four)[:4]:
        table.started(work, Slot((), 1))
    _progress(four[0])
    _progress(four[1], time=1.0)  # of an earlier start
    done = {"status": "finished", "steps": 10, "val_loss": 0.5, "ended_by": "pruned at step 10"}
    table.ended(Outcome(four[2], "finished", 61.0, done))
    table.ended(Outcome(four[3], "failed", 2.0, None, "exit status 1: ValueError: no rows", ("a", "b"), four[3].log))
    table.told("Somebody has pressed Ctrl-C")
    table.end()
    text = shown()
    last = text[text.rindex("5 jobs: ") :]
    assert last.startswith("5 jobs: 1 finished · 2 running · 1 waiting · 1 failed")
    rows = {line.split()[0]: line.split()[1:] for line in last.splitlines()[2:7]}
    assert rows["0"][:4] == ["r=1", "running", "3/10", "1.2500"]
    assert rows["0"][-1] in ("0:13", "0:14")
    assert rows["1"][:2] == ["r=2", "running"]
    assert "3/10" not in rows["1"]
    assert rows["2"] == ["r=4", "pruned", "at", "step", "10", "10", "0.5000", "1:01"]
    assert rows["3"] == ["r=8", "failed", "0:02"]
    assert rows["4"] == ["r=16", "waiting"]
    assert "Somebody has pressed Ctrl-C" in text
    assert f"Job 3 (r=8): exit status 1: ValueError: no rows\n    a\n    b\n    All of it: {four[3].log}" in last


def test_more_jobs_than_rows_are_counted(jobs, screen):
    console, shown = screen(height=12)
    many = jobs(30)
    table = LiveTable(console)
    table.begin(_works(many), Pool(2, gpus=(), cores=2))
    for job in many[:20]:
        table.started(_works([job])[0], Slot((), 1))
    for job in many[:18]:
        failed = job.number in (4, 9)
        table.ended(Outcome(job, "failed" if failed else "finished", 1.0, {"val_loss": 1.0}))
    table._draw()
    text = shown()
    last = text[text.rindex("30 jobs: ") :].splitlines()
    assert last[0].startswith("30 jobs: 16 finished · 2 running · 10 waiting · 2 failed")
    assert [line.split()[0] for line in last[2:8]] == ["0", "1", "4", "9", "18", "19"]
    assert last[8] == "… and 24 more: 14 finished, 10 waiting"
    assert len(last) < 12
    table._live.stop()


STATES = ["running", "failed", "interrupted", "finished", "waiting", "not started"]


@given(st.lists(st.sampled_from(STATES), max_size=40), st.integers(1, 20))
def test_what_runs_and_what_failed_is_shown_first(states, most):
    rows = [Row(Job(n, (), Path("/nowhere")), "", state) for n, state in enumerate(states)]
    shown, rest = chosen(rows, most)
    assert sorted(row.job.number for row in shown + rest) == list(range(len(rows)))
    assert len(shown) == min(most, len(rows))
    assert [row.job.number for row in shown] == sorted(row.job.number for row in shown)
    if rest:
        assert max(STATES.index(row.state) for row in shown) <= min(STATES.index(row.state) for row in rest)


_seconds = st.floats(0, 1e4)


@given(
    st.lists(st.floats(1, 1e4), min_size=1, max_size=5),
    st.lists(st.tuples(_seconds, st.none() | _seconds), max_size=4),
    st.integers(0, 20),
    st.integers(1, 4),
)
def test_the_time_that_is_left_is_that_of_a_full_machine(taken, running, waiting, places):
    left = time_left(taken, running, waiting, places)
    usual = sum(taken) / len(taken)
    lefts = [max(0.0, usual - so_far) if own is None else own for so_far, own in running]
    if not running and not waiting:
        assert left is None
        return
    places = max(places, len(running))
    total = sum(lefts) + waiting * usual
    assert total / places - 1e-6 <= left <= total / places + max([*lefts, usual]) + 1e-6


def test_nothing_is_foretold_where_nothing_is_known():
    assert time_left([], [(3.0, None)], 5, 2) is None
    assert time_left([], [(3.0, 7.0)], 2, 1) == 27.0


def test_only_the_first_failures_are_told_in_full(jobs, screen):
    console, shown = screen()
    console.print(
        failures([Outcome(job, "failed", 1.0, None, "exit status 1", ("why",), job.log) for job in jobs(7)], {})
    )
    text = shown()
    assert text.count("why") == 5
    assert text.count("All of it") == 7


def test_a_file_has_a_line_for_each_event(make_work, environment, screen):
    console, shown = screen(terminal=False)
    works = [
        make_work(0, "leave(val_loss=0.25)", "lora.r=8"),
        make_work(1, "print('before')\nraise KeyError('instruction')", "lora.r=16"),
    ]
    run(works, Pool(1, gpus=(), cores=1), watch=LiveTable(console), environment=environment)
    lines = [re.sub(r"^\[\d\d:\d\d:\d\d] ", "", line) for line in shown().splitlines()]
    assert lines[0] == "2 jobs. Here is no GPU, and 1 CPU core" or lines[0].startswith("2 jobs. Here is no GPU (")
    assert lines[1] == "job 0 (r=8) started on CPU, 1 thread"
    assert re.fullmatch(
        r"job 0 \(r=8\) finished after 0:0\d: val_loss 0.2500 \(1 of 2 have ended, about 0:0\d left\)", lines[2]
    )
    assert re.fullmatch(
        r"job 1 \(r=16\) failed after 0:0\d: exit status 1: KeyError: 'instruction' \(2 of 2 have ended\)", lines[4]
    )
    assert lines[5].startswith("2 jobs: 1 finished · 1 failed")
    assert "    KeyError: 'instruction'" in lines
    assert "    before" in lines


def test_jobs_that_are_trained_together_are_told_together(jobs, screen):
    console, shown = screen(terminal=False)
    two = jobs(2)
    table = LiveTable(console)
    work = Work(tuple(two), (), two[0].log)
    table.begin([work], Pool(1, gpus=(), cores=1))
    table.started(work, Slot(("0",), 1))
    assert "job 0 (r=1), job 1 (r=2) started together on GPU 0" in shown()


IN_TERMINAL = """
import os, pickle, sys
from lora_lightning.sweeps.devices import Pool
from lora_lightning.sweeps.engine import run
from lora_lightning.sweeps.table import LiveTable
run(pickle.load(open(sys.argv[1], "rb")), Pool(2, gpus=(), cores=2), watch=LiveTable())
"""


def test_a_terminal_has_a_living_table(make_work, environment, tmp_path):
    step = (
        "content = {'step': 1, 'steps': 3, 'loss': 1.0, 'seconds_left': 1.0, 'time': time.time()}\n"
        "(folder / 'progress.json').write_text(json.dumps(content))\n"
        f"while not Path({str(tmp_path / 'seen')!r}).exists(): time.sleep(0.01)\n"
        "leave(val_loss=0.5, steps=3)"
    )
    file = tmp_path / "works"
    file.write_bytes(pickle.dumps([make_work(n, step) for n in range(2)]))
    mine, its = pty.openpty()
    variables = {**environment, "TERM": "xterm", "COLUMNS": "90", "LINES": "20"}
    process = subprocess.Popen([sys.executable, "-c", IN_TERMINAL, file], stdout=its, stderr=its, env=variables)
    os.close(its)
    text = b""
    try:
        while chunk := os.read(mine, 4096):
            text += chunk
            if text.count(b"1/3") >= 2:
                (tmp_path / "seen").touch()
    except OSError:  # so a terminal ends
        pass
    assert process.wait(120) == 0
    os.close(mine)
    shown = ESCAPES.sub("", text.decode())
    assert "2 running" in shown
    assert "1/3" in shown
    last = shown[shown.rindex("2 jobs: ") :]
    assert last.startswith("2 jobs: 2 finished")
    assert last.count("0.5000") == 2


def test_times():
    assert [clock(0), clock(59.9), clock(3600)] == ["0:00", "0:59", "1:00:00"]
