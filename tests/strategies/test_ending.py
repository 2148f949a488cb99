"""How a process of several ends: real processes of one gloo group, one of which leaves the other alone."""

import os
import subprocess

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from lora_lightning.cli.launch import launch
from lora_lightning.errors import LoraConfigError
from lora_lightning.strategies.ending import leave_group_at_exit

def fail(cfg):
    raise LoraConfigError("on one process alone")

rank, meeting, end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
if end != "told":
    leave_group_at_exit()
if rank == 1:
    sys.stdin.readline()
    sys.exit(0)
if end != "done":
    pending = dist.all_reduce(torch.ones(1), async_op=True)
if end == "raises":
    raise ValueError("nobody has caught this")
if end == "told":  # a command sees to it by itself
    sys.argv = [sys.argv[0], "experiment=smoke", f"hydra.run.dir={meeting}-run"]
    launch("train", fail)
sys.exit({"done": 0, "leaves": 3}[end])
"""


@pytest.mark.parametrize(("end", "status"), [("done", 0), ("leaves", 3), ("raises", 1), ("told", 1)])
def test_a_process_ends_with_its_status_while_the_other_one_waits(tmp_path, warm_python, end, status):
    (tmp_path / "script.py").write_text(SCRIPT)
    first, second = (
        subprocess.Popen(
            [warm_python, tmp_path / "script.py", str(rank), tmp_path / "meeting", end],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    try:
        assert first.wait(timeout=60) == status, first.stderr.read()
        assert second.poll() is None
        _, errors = second.communicate("\n", timeout=60)
        assert second.returncode == 0, errors
    finally:
        for process in (first, second):
            process.kill()
