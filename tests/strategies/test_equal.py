"""Two real processes that really differ: found out, by name and rank."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.strategies.equal import assert_equal_across_ranks, differing, digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (513,), (100, 33)])
def test_one_changed_value_changes_the_number(dtype, shape):
    tensor = (torch.randn(shape) * 50).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    for position in {0, tensor.numel() // 2, tensor.numel() - 1}:
        other = tensor.clone()
        other.view(-1)[position] += 1
        assert digest(other) != digest(tensor)


def test_the_order_of_values_counts_and_their_place_in_memory_does_not():
    tensor = torch.randn(1000, 101)
    assert digest(tensor.flip(0)) != digest(tensor)
    assert digest(tensor.t()) == digest(tensor.t().contiguous())
    assert digest(tensor[1:]) == digest(tensor[1:].clone())
    assert digest(-torch.zeros(3)) != digest(torch.zeros(3))


def test_a_process_alone_differs_from_nobody():
    assert differing({"a": torch.ones(2)}) == {}
    assert_equal_across_ranks({"a": torch.ones(2)})


SCRIPT = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
from lora_lightning.errors import AdapterError
from lora_lightning.strategies.equal import assert_equal_across_ranks, differing

same = torch.arange(1000.0)
other = same.clone()
other[500] += rank * 1e-4
assert differing({"same": same}) == {}
assert_equal_across_ranks({"same": same})
assert differing({"same": same, "other": other, "nan": same * float("nan")}) == {"other": [1]}
alone = dist.new_group([0])
assert rank == 1 or differing({"other": other}, alone) == {}
try:
    assert_equal_across_ranks({"same": same, "layer.lora_A": other})
except AdapterError as error:
    assert "layer.lora_A on rank 1 is not what rank 0 has" in str(error), error
else:
    raise SystemExit("nothing raised")
try:
    differing({"same": same, **({"more": other} if rank else {})})
except AdapterError as error:
    assert "rank 1 has other tensors than rank 0 (2 and 1; the first that differs: more)" in str(error), error
else:
    raise SystemExit("nothing raised")

mesh = init_device_mesh("cpu", (2,))
split = distribute_tensor(same, mesh, [Shard(0)])  # everyone has another part: nothing to compare
copied = distribute_tensor(other, mesh, [Replicate()], src_data_rank=None)
assert differing({"split": split, "copied": copied}) == {"copied": [1]}
"""


def test_two_processes(processes):
    processes(SCRIPT)
