"""Jobs of a sweep that are small real programs."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from lora_lightning.sweeps.runs import Job, Work

_HEAD = (
    "import json, os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
    "folder, overrides = Path(sys.argv[1]), sys.argv[2:]\n"
    "def leave(status='finished', **more):\n"
    "    (folder / 'result.json').write_text(json.dumps({'status': status, 'overrides': overrides, **more}))\n"
    "def loose():\n"
    "    if os.fork() == 0:\n"
    "        os.setsid()\n"
    "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "        if os.fork() == 0:\n"
    "            (folder / 'loose').touch()\n"
    "            time.sleep(100)\n"
    "        os._exit(0)\n"
    "    while not (folder / 'loose').exists():\n"
    "        time.sleep(0.01)\n"
)


@pytest.fixture
def make_work(tmp_path):
    """make_work(number, script, *overrides, devices=1, accelerator='cpu'): a job that runs a script.

    In the script ``folder``, ``overrides`` and ``leave(status, **fields)``, which writes result.json, are there, and
    ``loose()``, which starts a process that left the session, ignores SIGTERM and has no parent any more.
    """

    def make(number, script, *overrides, devices=1, accelerator="cpu", jobs=None, environment=()):
        overrides = overrides or (f"n={number}",)
        job = Job(number, overrides, tmp_path / "sweep" / str(number), devices, accelerator)
        file = tmp_path / f"job{number}.py"
        file.write_text(_HEAD + script)
        command = (sys.executable, "-I", "-S", str(file), str(job.folder), *overrides)
        return Work(jobs or (job,), command, job.folder / "work.log", tuple(environment))

    return make


@pytest.fixture
def until():
    """until(condition): wait until it holds, and say whether it does."""

    def wait(condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        return bool(condition())

    return wait


@pytest.fixture
def marked(tmp_path):
    """marked(): the processes of this test's jobs, found by its folder in their environment."""

    def alive():
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("MARK") == str(tmp_path):
                    found.append(process)
            except psutil.Error:
                continue
        return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    yield alive
    for process in alive():
        process.kill()


@pytest.fixture
def environment(tmp_path):
    """The variables of jobs, by which ``marked`` finds their processes."""
    return {**os.environ, "MARK": str(tmp_path)}
