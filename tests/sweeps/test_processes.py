"""Processes of jobs: what they are given, and that nothing of them is left, however they, or the sweep, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.sweeps import processes
from lora_lightning.sweeps.processes import HeldError, Process, last_lines, said, still_running, wait_for_earlier


def test_a_job_has_a_log_and_a_session_and_no_terminal(make_work, environment):
    script = (
        "print('session', os.getsid(0), 'group', os.getpgid(0), 'me', os.getpid())\n"
        "print(repr(sys.stdin.read()), os.environ['MORE'], file=sys.stderr)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    work = make_work(0, script, environment=[("MORE", "more")])
    work.log.parent.mkdir(parents=True)
    work.log.write_text("of an earlier start\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        process = Process(work, environment)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.wait(60) == 0
    assert work.log.read_text().startswith("of an earlier start\n")
    lines = process.last_lines()
    words = next(line for line in lines if line.startswith("session")).split()
    assert (int(words[1]), words[3]) == (process.pid, words[5])
    assert "'' more" in lines
    assert "True" in lines
    assert "of an earlier start" not in lines


@pytest.mark.parametrize(
    ("script", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("leave()", 0)]
)
def test_the_status_is_the_jobs(make_work, environment, script, status):
    assert Process(make_work(0, script), environment).wait(60) == status


def test_a_program_that_is_not_there_is_told(make_work, environment, tmp_path):
    work = make_work(0, "")
    process = Process(type(work)(work.jobs, (str(tmp_path / "nothing"),), work.log), environment)
    assert process.wait(60) == 127
    assert process.last_lines() == [f"{tmp_path / 'nothing'} could not be started: No such file or directory"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_asked_to_end_saves(make_work, environment, marked, until, number):
    """Its first process alone gets the signal, once; its children end by its own doing."""
    script = (
        "def save(number, frame):\n    leave('interrupted', signal=number)\n    child.terminate()\n    sys.exit(5)\n"
        "signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)\n"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(100)'])\n"
        "(folder / 'ready').touch()\n"
        "child.wait()\nleave('the child was hit')\n"
    )
    work = make_work(0, script)
    process = Process(work, environment)
    assert until((work.jobs[0].folder / "ready").exists)
    process.stop(number)
    assert process.wait(60) == 5
    assert f'"signal": {int(number)}' in (work.jobs[0].folder / "result.json").read_text()
    assert marked() == []


def test_a_job_that_does_not_listen_is_ended_after_its_patience(make_work, environment, marked, until):
    script = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n(folder / 'ready').touch()\ntime.sleep(100)"
    work = make_work(0, script)
    process = Process(work, environment, patience=0.2)
    assert until((work.jobs[0].folder / "ready").exists)
    process.stop(signal.SIGINT)
    assert process.wait(60) == -signal.SIGTERM
    assert marked() == []


def test_killing_reaches_what_has_left_the_session(make_work, environment, marked, until):
    work = make_work(0, "loose()\n(folder / 'ready').touch()\ntime.sleep(100)")
    process = Process(work, environment)
    assert until((work.jobs[0].folder / "ready").exists)
    assert len(marked()) == 3  # the guard, the job, and what it has let loose
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert marked() == []


@pytest.fixture
def hasty_guard(tmp_path):
    """The same guard with less patience for what is left of a job."""
    file = tmp_path / "guard.py"
    text = processes._GUARD.read_text()
    assert "LINGER = 10.0" in text
    assert "LAST = 5.0" in text
    file.write_text(text.replace("LINGER = 10.0", "LINGER = 0.2").replace("LAST = 5.0", "LAST = 0.2"))
    return file


def test_what_outlives_a_jobs_first_process_is_ended(make_work, environment, marked, monkeypatch, hasty_guard):
    monkeypatch.setattr(processes, "_GUARD", hasty_guard)
    work = make_work(0, "loose()\nsys.exit(4)")
    process = Process(work, environment)
    assert process.wait(60) == 4
    assert marked() == []


PARENT = """
import os, sys
from pathlib import Path
from lora_lightning.sweeps import processes
from lora_lightning.sweeps.processes import Process
from lora_lightning.sweeps.runs import Job, Work
folder, processes._GUARD = Path(sys.argv[1]), Path(sys.argv[2])
process = Process(Work((Job(0, (), folder),), tuple(sys.argv[3:]), folder / "work.log"), os.environ, patience=0.5)
process.wait()
"""


@pytest.mark.parametrize("listens", [True, False])
def test_jobs_end_with_a_killed_sweep_and_hold_their_folder_until_then(
    make_work, environment, marked, until, listens, hasty_guard
):
    script = (
        "def save(number, frame):\n    time.sleep(0.3)\n    leave('interrupted')\n    sys.exit()\n"
        f"signal.signal(signal.SIGTERM, save if {listens} else signal.SIG_IGN)\n"
        f"{'' if listens else 'loose()'}\n(folder / 'ready').touch()\n"
        "while True: time.sleep(1)\n"
    )
    work = make_work(0, script)
    (job,) = work.jobs
    parent = subprocess.Popen([sys.executable, "-c", PARENT, job.folder, hasty_guard, *work.command], env=environment)
    try:
        assert until((job.folder / "ready").exists)
        assert still_running([job]) == [job]
        with pytest.raises(HeldError, match=r"process \d+ of an earlier sweep still runs in"):
            Process(work, environment)
    finally:
        parent.kill()
        parent.wait()
    told = []
    assert wait_for_earlier([job], told.append, patience=15) == []
    assert len(told) == 1
    assert "job 0 (process " in told[0]
    assert marked() == []
    assert (job.folder / "result.json").exists() == listens
    assert wait_for_earlier([job], told.append, patience=0) == []
    assert len(told) == 1


def test_the_end_of_a_log_is_what_a_screen_would_show(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(
        b"one\n\x1b[31mtwo\x1b[0m\n"
        + b"\r".join(b"step %d" % n for n in range(50_000))
        + b"\r\n\n  \nthree \xff\n\x1b]8;;link\x07four\x1b]8;;\x07"
    )
    assert last_lines(log, 3) == ["step 49999", "three \ufffd", "four"]
    assert last_lines(log, since=log.stat().st_size) == []
    assert last_lines(tmp_path / "none") == []


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1), max_size=40))
def test_plain_lines_come_back(tmp_path_factory, lines):
    log = tmp_path_factory.mktemp("log") / "log"
    log.write_text("\n".join(lines), encoding="utf-8")
    assert last_lines(log, 20) == [line.rstrip() for line in lines if line.strip()][-20:]


def test_a_status_in_words():
    assert said(1, ["x", "torch.OutOfMemoryError: CUDA", "at exit"]) == "exit status 1: torch.OutOfMemoryError: CUDA"
    assert said(2, ["Error, or so"]) == "exit status 2"
    assert said(-11, []) == "killed by SIGSEGV"
    assert said(-signal.SIGKILL, []).endswith("no memory left")


def test_none_of_it_loads_torch_lightning_or_hydra():
    names = "devices engine guard locks manifest processes runs table"
    script = (
        "import importlib, sys\n"
        f"for name in '{names}'.split(): importlib.import_module('lora_lightning.sweeps.' + name)\n"
        "print({'torch', 'lightning', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert out.stdout == "set()\n"
