"""The measuring itself: what is counted, and that it is counted right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.measure import interleave, profile, ratios, saved_bytes, spread, tensors_of
from benchmarks.workers import Worker

ROOT = Path(__file__).parent.parent.parent


class Process:
    """What a worker makes in these tests."""

    def __init__(self, number: int) -> None:
        self.number = number

    def about(self) -> tuple[int, int]:
        return self.number, os.getpid()

    def fail(self) -> None:
        raise ValueError("said so")

    def vanish(self) -> None:
        os._exit(3)


def test_turns_alternate_their_order_and_warm_up_does_not_count():
    seen = []

    def turn(name):
        return lambda number: seen.append((name, number)) or float(number)

    times = interleave({"a": turn("a"), "b": turn("b")}, 2, warmup=1)
    assert seen == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert times == {"a": [0.0, 1.0], "b": [0.0, 1.0]}


def test_measuring_ends_when_told_to_and_all_have_equally_many_turns():
    times = interleave({"a": lambda n: 1.0, "b": lambda n: 1.0}, 50, go_on=lambda: False)
    assert [len(taken) for taken in times.values()] == [2, 2]


def test_ratio_is_the_median_of_ratios_within_a_turn():
    # the machine slows down tenfold in the third turn; a ratio of medians would be 0.05
    told = ratios({"a": [1.0, 1.0, 10.0], "b": [2.0, 2.0, 20.0]}, "a", "b")
    assert (told["low"], told["median"], told["high"], told["n"]) == (0.5, 0.5, 0.5, 3)
    assert spread([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0, "n": 1}


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(100, 64, requires_grad=True)

    def step():
        y = layer(x)  # saves x, and the weight
        (y.sin() + y.cos()).sum().backward()  # each saves y

    one = 100 * 64 * 4
    assert saved_bytes(step, tensors_of(layer)) == 2 * one
    assert saved_bytes(step) == 2 * one + 64 * 64 * 4


def test_saved_bytes_are_those_alive_at_one_time():
    x = torch.randn(1000, requires_grad=True)

    def step():
        for _ in range(5):
            (x * 2).exp().sum().backward()  # saves its result, which is gone before the next

    assert saved_bytes(step) == 4000


def test_checkpointing_saves_less():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6)))
    x = torch.randn(64, 32, requires_grad=True)

    def plain():
        blocks(x).sum().backward()

    def less():
        y = x
        for block in blocks:
            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
        y.sum().backward()

    assert saved_bytes(less, tensors_of(blocks)) < 0.5 * saved_bytes(plain, tensors_of(blocks))


PEAK = """
import torch
from benchmarks.measure import peak_of

def use(megabytes):
    torch.ones(megabytes * 2**20, dtype=torch.uint8)

use(200)  # an earlier peak
told = peak_of(lambda: use(50))
print((told["peak"] - told["before"]) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_is_this_functions_own(warm_python):
    # In a process of its own: where a training has run, freed memory is kept and used again.
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([warm_python, "-c", PEAK], env=env, capture_output=True, text=True, timeout=300, check=True)
    assert 45 < float(done.stdout) < 100


def test_profile_shares_add_up_and_name_the_costly():
    a = torch.randn(300, 300)
    told = profile(lambda: [a @ a for _ in range(20)], top=3)
    assert told["ops"][0]["op"] == "mm"
    assert sum(op["share"] for op in told["ops"]) == pytest.approx(1)


def test_worker_is_another_process_and_tells_what_went_wrong():
    worker = Worker(Process, 7)
    try:
        number, pid = worker.call("about")
        assert number == 7
        assert pid != os.getpid()
        with pytest.raises(RuntimeError, match="ValueError: said so"):
            worker.call("fail")
    finally:
        worker.close()


def test_worker_that_is_gone_is_noticed():
    worker = Worker(Process, 1)
    try:
        with pytest.raises(RuntimeError, match="status 3"):
            worker.call("vanish")
    finally:
        worker.close()


def test_workers_end_with_the_process_that_started_them():
    code = (
        "from benchmarks.workers import Worker; from tests.benchmarks.test_measure import Process\n"
        "if __name__ == '__main__':\n"
        "    print(Worker(Process, 1).call('about')[1], flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} is still there")
