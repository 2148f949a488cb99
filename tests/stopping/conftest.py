"""Runs in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lora_lightning

ROOT = Path(lora_lightning.__file__).parents[1]


class Ended(NamedTuple):
    """What became of a run."""

    status: int
    said: str
    others: list[int]
    """The status of the processes after the first."""
    out: Path

    @property
    def stopped(self) -> Path:
        """The checkpoint that a stopped run leaves."""
        return self.out / "checkpoints" / "stopped.ckpt"

    def adapter(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """The final weights."""
        return torch.load(self.out / f"rank{rank}.pt", weights_only=True)

    def same_as(self, other: Ended, rank: int = 0) -> bool:
        """Whether two runs ended with the same adapter, to the bit."""
        a, b = self.adapter(rank), other.adapter(rank)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Iterator[Callable[..., Ended]]:
    """Trains with the settings of `worker.py` until all processes have ended."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM"))}
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("worker.py")],
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path_factory.mktemp("runs")
    count = 0

    def run(**settings) -> Ended:
        nonlocal count
        count += 1
        out = folder / f"run{count}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            settings |= {"out": str(out), "port": free.getsockname()[1]}
        server.stdin.write(json.dumps(settings) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        said = "".join(Path(f"{out}-{rank}.txt").read_text() for rank in range(len(statuses)))
        return Ended(statuses[0], said, statuses[1:], out)

    yield run
    server.stdin.close()
    server.wait(300)


@pytest.fixture(scope="session")
def whole(run) -> Callable[..., Ended]:
    """An uninterrupted run, once for all that ask for the same."""
    known: dict[str, Ended] = {}

    def whole(**settings) -> Ended:
        key = json.dumps(settings)
        if key not in known:
            known[key] = run(**settings)
            assert known[key].status == 0, known[key].said
        return known[key]

    return whole
