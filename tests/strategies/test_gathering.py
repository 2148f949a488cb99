"""Tensors that are made whole together are those that torch makes whole one at a time."""

SCRIPT = """
import torch.distributed.device_mesh as meshes
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from lora_lightning.strategies import gathering

mesh = meshes.init_device_mesh("cpu", (world,), mesh_dim_names=("data_parallel",))
square = meshes.init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
torch.manual_seed(0)
shapes = [(5, 3), (1, 4), (4, 2), (0, 3), (7,), (2, 5, 3), (3, 1)]
values, spread = [], []
for number, shape in enumerate(shapes):
    for kind in (torch.float32, torch.float32, torch.bfloat16):
        value = torch.randn(shape).to(kind)
        values.append(value)
        spread.append(distribute_tensor(value, mesh, [Shard(number % len(shape))], src_data_rank=None))
for value in (torch.randn(3, 4), torch.randn(6, 2)):
    values += [value] * 3
    spread.append(value)
    spread.append(distribute_tensor(value, mesh, [Replicate()], src_data_rank=None))
    spread.append(distribute_tensor(value, square, [Replicate(), Shard(1)], src_data_rank=None))

calls = []
real = torch.distributed.all_gather
torch.distributed.all_gather = lambda *a, **k: (calls.append(1), real(*a, **k))[1]
for limit, most in ((1 << 24, 20), (64, 100)):
    gathering._TOGETHER = limit
    found = list(gathering.whole_together(spread))
    assert len(found) == len(values)
    assert all(torch.equal(a, b) for a, b in zip(found, values))
calls.clear()
gathering._TOGETHER = 1 << 24
alike = [t for t in spread[:21] if t.dtype == torch.float32]
list(gathering.whole_together(alike))
assert len(calls) == 1
assert list(gathering.whole_together([])) == []
"""


def test_whole_together(processes):
    processes(SCRIPT)
    processes(SCRIPT, world=3)
