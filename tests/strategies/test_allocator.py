"""Page faults of a step, in processes of their own: what is set holds for a whole process."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from torch import nn
from lora_lightning.strategies.allocator import keep_freed_memory
torch.set_num_threads(1)
done = keep_freed_memory() if {wanted} else None
assert keep_freed_memory.cache_info().currsize == (1 if {wanted} else 0)
model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
x = torch.randn(4096, 256)  # each activation is 4 MiB
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    model(x).square().mean().backward()
before = faults()
for _ in range(8):
    model(x).square().mean().backward()
print(done, faults() - before)
"""


def _run(wanted, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env |= {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **variables}
    code = STEPS.format(wanted=wanted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_steps_fault_few_pages_in_where_freed_memory_is_kept():
    # By itself the C library soon keeps some blocks, how many goes by where they lie: it is held to its start.
    _, before = _run(False, MALLOC_MMAP_THRESHOLD_=str(2**17))
    told, after = _run(True)
    assert told == "True"
    assert before > 20_000  # 4 MiB are 1024 pages
    assert after < 2000  # what is kept is at times cut up, and a few blocks are asked for still


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_is_left_alone(name, monkeypatch):
    from lora_lightning.strategies.allocator import keep_freed_memory

    monkeypatch.setenv(name, "1")
    assert keep_freed_memory.__wrapped__() is False
