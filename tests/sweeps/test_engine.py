"""Whole small sweeps of real processes: order, places, outcomes, and every way in which they may be ended."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.devices import Pool
from lora_lightning.sweeps.engine import SweepInterrupted, Watch, run
from lora_lightning.sweeps.processes import Process
from lora_lightning.sweeps.runs import Job

TIMED = "a = time.time()\ntime.sleep(0.15)\nleave(began=a, ended=time.time(), gpus=os.environ['CUDA_VISIBLE_DEVICES'])"
WAITING = "(folder / 'ready').touch()\ntime.sleep(100)"
SAVING = (
    "def save(number, frame):\n    leave('interrupted')\n    sys.exit(1)\n"
    "signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)\n" + WAITING
)


class Events(Watch):
    def __init__(self):
        self.seen = []

    def begin(self, works, pool):
        self.seen.append(("begin", sum(len(work.jobs) for work in works)))

    def started(self, work, slot):
        self.seen.append(("started", *(job.number for job in work.jobs)))

    def ended(self, outcome):
        self.seen.append(("ended", outcome.job.number, outcome.state))

    def told(self, message):
        self.seen.append(("told", message))

    def end(self):
        self.seen.append(("end",))


@pytest.fixture
def cpu():
    return Pool(2, gpus=(), cores=2)


def test_every_job_has_its_outcome(make_work, environment, cpu):
    works = [
        make_work(0, "print('fine')\nleave(val_loss=0.5)"),
        make_work(1, "print('one\\rtwo')\nraise ValueError('no rows')"),
        make_work(2, "os.kill(os.getpid(), signal.SIGKILL)"),
        make_work(3, "pass"),
        make_work(4, "leave('interrupted')\nsys.exit(7)"),
        make_work(5, "leave()\nos.abort()"),
        make_work(6, "leave('failed', error='diverged at step 3')\nsys.exit(1)"),
    ]
    watch = Events()
    outcomes = run(works, cpu, watch=watch, environment=environment)
    assert list(map(outcomes.__getitem__, range(7))) == [outcomes[number] for number in sorted(outcomes)]
    states = [outcomes[number].state for number in range(7)]
    assert states == ["finished", "failed", "failed", "failed", "interrupted", "finished", "failed"]
    assert outcomes[0].result["val_loss"] == 0.5
    assert (outcomes[0].reason, outcomes[0].lines) == (None, ())
    assert outcomes[1].reason == "exit status 1: ValueError: no rows"
    assert outcomes[1].lines[0] == "two"
    assert outcomes[1].log == works[1].log
    assert outcomes[2].reason.startswith("killed by SIGKILL")
    assert outcomes[3].reason == "it ended without a whole result.json"
    assert outcomes[4].reason == "exit status 7"
    assert outcomes[6].reason == "diverged at step 3"
    assert watch.seen[0] == ("begin", 7)
    assert watch.seen[-1] == ("end",)
    assert {("ended", number, outcomes[number].state) for number in range(7)} <= set(watch.seen)
    assert all(outcome.seconds > 0 for outcome in outcomes.values())


def test_a_result_of_an_earlier_start_is_none_of_this_one(make_work, environment, cpu):
    work = make_work(0, "sys.exit(1)")
    job = work.jobs[0]
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"status": "finished", "overrides": ["n=0"]}))
    (outcome,) = run([work], cpu, environment=environment).values()
    assert (outcome.state, outcome.result) == ("failed", None)


def test_places_are_given_in_order_and_never_twice(make_work, environment):
    """Job 1 wants both GPUs: jobs 2 and 3 do not overtake it. The CPU is free for job 4 at once."""
    wanted = [("gpu", 1), ("gpu", 2), ("gpu", 1), ("gpu", 1), ("cpu", 1)]
    works = [make_work(n, TIMED, accelerator=kind, devices=count) for n, (kind, count) in enumerate(wanted)]
    watch = Events()
    outcomes = run(works, Pool(gpus=("5", "MIG-7"), cores=2), watch=watch, environment=environment)
    started = [event[1] for event in watch.seen if event[0] == "started"]
    assert [number for number in started if number != 4] == [0, 1, 2, 3]
    assert started[:2] == [0, 4]
    results = [outcomes[number].result for number in range(5)]
    assert results[1]["gpus"] == "5,MIG-7"
    assert {results[2]["gpus"], results[3]["gpus"]} == {"5", "MIG-7"}
    assert results[4]["gpus"] == ""
    assert results[1]["began"] >= results[0]["ended"]
    assert min(results[2]["began"], results[3]["began"]) >= results[1]["ended"]


def test_a_job_sees_what_it_is_given(make_work, environment, cpu):
    names = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LORA_LIGHTNING_JOB", "MARK"]
    work = make_work(
        0, f"leave(**{{name: os.environ[name] for name in {names}}})", environment=[("LORA_LIGHTNING_JOB", "0")]
    )
    (outcome,) = run([work], cpu, environment={**environment, "OMP_NUM_THREADS": "64"}).values()
    assert [outcome.result[name] for name in names] == ["1", "", "0", environment["MARK"]]


def test_too_many_devices_are_told_before_anything_starts(make_work, cpu):
    works = [make_work(0, "leave()"), make_work(1, "leave()", accelerator="gpu")]
    with pytest.raises(LoraConfigError, match="job 1 needs 1 GPU"):
        run(works, cpu)
    assert not works[0].log.exists()


def test_a_program_that_cannot_be_started_is_a_failed_job(make_work, environment, cpu):
    good, bad = make_work(0, "leave()"), make_work(1, "leave()")
    bad.jobs[0].folder.parent.mkdir(parents=True)
    bad.jobs[0].folder.write_text("a file where a folder should be")
    outcomes = run([bad, good], cpu, environment=environment)
    assert outcomes[1].state == "failed"
    assert "could not be started" in outcomes[1].reason
    assert outcomes[0].state == "finished"


def test_fail_fast_ends_the_others(make_work, environment, marked):
    works = [
        make_work(0, SAVING),
        make_work(1, "while not (folder.parent / '0' / 'ready').exists(): time.sleep(0.01)\nsys.exit(1)"),
        make_work(2, "leave()"),
    ]
    outcomes = run(works, Pool(2, gpus=(), cores=2), fail_fast=True, environment=environment)
    assert [outcomes[n].state for n in range(3)] == ["interrupted", "failed", "not started"]
    assert outcomes[0].reason == outcomes[2].reason == "job 1 failed, and fail_fast ends the others"
    assert outcomes[0].result["status"] == "interrupted"
    assert marked() == []


def test_jobs_that_share_a_process_end_one_by_one(make_work, environment, cpu, tmp_path):
    jobs = tuple(Job(n, (f"n={n}",), tmp_path / "sweep" / str(n)) for n in range(3))
    script = (
        "import time\nroot = folder.parent\n"
        "def put(n, **more):\n"
        "    (root / str(n)).mkdir(exist_ok=True)\n"
        "    (root / str(n) / 'result.json').write_text(json.dumps({'overrides': [f'n={n}'], **more}))\n"
        "(root / '1').mkdir(exist_ok=True); (root / '1' / 'job.log').write_text('loss is nan\\n')\n"
        "put(1, status='failed', error='it diverged')\n"
        "while not (root / 'told').exists(): time.sleep(0.01)\n"
        "put(0, status='finished')\nprint('the end of all')\nsys.exit(2)"
    )
    work = replace(make_work(0, script), jobs=jobs, log=tmp_path / "group.log")

    class Early(Events):
        def ended(self, outcome):
            super().ended(outcome)
            (tmp_path / "sweep" / "told").touch()

    watch = Early()
    outcomes = run([work], cpu, watch=watch, environment=environment)
    assert watch.seen[1:3] == [("started", 0, 1, 2), ("ended", 1, "failed")]
    assert [outcomes[n].state for n in range(3)] == ["finished", "failed", "failed"]
    assert (outcomes[1].reason, outcomes[1].lines) == ("it diverged", ("loss is nan",))
    assert outcomes[2].reason == "exit status 2"
    assert outcomes[2].lines == ("the end of all",)


def test_a_process_of_an_earlier_sweep_is_named(make_work, environment, cpu):
    earlier = make_work(0, WAITING)
    held = Process(earlier, environment)
    (outcome,) = run([earlier], cpu, environment=environment).values()
    assert outcome.state == "failed"
    assert f"process {held.pid} of an earlier sweep still runs in" in outcome.reason
    held.kill()
    held.wait()


def test_an_error_of_the_sweep_itself_leaves_nothing_running(make_work, environment, cpu, marked):
    class Broken(Watch):
        def started(self, work, slot):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run([make_work(0, "time.sleep(100)")], cpu, watch=Broken(), environment=environment)
    assert marked() == []


def test_it_runs_beside_the_main_thread(make_work, environment, cpu):
    found = {}
    thread = threading.Thread(target=lambda: found.update(run([make_work(0, "leave()")], cpu, environment=environment)))
    thread.start()
    thread.join(20)
    assert found[0].state == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_tells_the_outcomes(make_work, environment, marked, number):
    works = [make_work(0, "leave()"), make_work(1, SAVING), make_work(2, SAVING), make_work(3, "leave()")]

    class Interrupting(Events):
        sent = 0

        def look(self):
            if not self.sent and all((work.jobs[0].folder / "ready").exists() for work in works[1:3]):
                self.sent = 2
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a launcher passes on what the terminal has sent already

    watch = Interrupting()
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as error:
        run(works, Pool(2, gpus=(), cores=2), watch=watch, environment=environment)
    assert signal.getsignal(number) == handler
    assert isinstance(error.value, SweepInterrupted)
    assert error.value.number == number
    outcomes = error.value.outcomes
    assert [outcomes[n].state for n in range(4)] == ["finished", "interrupted", "interrupted", "not started"]
    assert outcomes[3].reason == f"{number.name} ended the sweep"
    assert outcomes[1].result["status"] == "interrupted"
    assert {("ended", n, outcomes[n].state) for n in range(4)} <= set(watch.seen)
    assert marked() == []


PARENT = """
import pickle, sys
from lora_lightning.sweeps.devices import Pool
from lora_lightning.sweeps.engine import Watch, run
class Telling(Watch):
    def ended(self, outcome): print(outcome.job.number, outcome.state, flush=True)
    def told(self, message): print(message, flush=True)
works = pickle.load(open(sys.argv[1], "rb"))
run(works, Pool(len(works), gpus=(), cores=2), watch=Telling())
"""


@pytest.fixture
def parent(tmp_path, environment):
    """Starts a sweep in a process of its own session, so that a test may end it in any way."""
    started = []

    def start(works):
        file = tmp_path / "works"
        file.write_bytes(pickle.dumps(works))
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, file],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_kills_at_once(make_work, parent, marked, until):
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\nloose()\n"
    works = [make_work(n, deaf + WAITING) for n in range(2)]
    process = parent(works)
    assert until(lambda: all((work.jobs[0].folder / "ready").exists() for work in works))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert "told to save and end" in process.stdout.readline()
    time.sleep(1.2)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert "SIGINT again" in out
    assert {"0 interrupted", "1 interrupted"} <= set(out.splitlines())
    assert "SweepInterrupted" in error
    assert marked() == []


def test_jobs_of_a_sigkilled_sweep_save_and_end(make_work, parent, marked, until):
    works = [make_work(n, SAVING) for n in range(2)]
    process = parent(works)
    assert until(lambda: all((work.jobs[0].folder / "ready").exists() for work in works))
    process.kill()
    process.wait()
    assert until(lambda: marked() == [])
    for work in works:
        assert json.loads((work.jobs[0].folder / "result.json").read_text())["status"] == "interrupted"
