"""Random states on their way from processes that each had rows of their own to some that share a layer's work."""

TENSOR = """
from types import SimpleNamespace
import torch.distributed.device_mesh as meshes
from lora_lightning.strategies.ranks import first_with_same_rows, of_all_ranks
from lora_lightning.strategies import rng

names = ("data_parallel", "tensor_parallel")
for sizes, wanted in (((1, 2), [0, 0]), ((2, 1), [0, 1])):
    mesh = meshes.init_device_mesh("cpu", sizes, mesh_dim_names=names)
    assert of_all_ranks(first_with_same_rows(SimpleNamespace(device_mesh=mesh))) == wanted
assert of_all_ranks(first_with_same_rows(SimpleNamespace())) == [0, 1]
torch.manual_seed(rank)
states = rng.gather()
shared = meshes.init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
rng.restore(rng.of_rank(states, first_with_same_rows(SimpleNamespace(device_mesh=shared))))
drawn = of_all_ranks(torch.rand(3).tolist())
assert drawn[0] == drawn[1]
assert rng.of_rank(states[:1], 0) is None
"""


def test_a_tensor_parallel_group_draws_alike(processes):
    processes(TENSOR)
