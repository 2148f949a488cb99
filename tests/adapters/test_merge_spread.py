"""Merging where an engine has spread the base over processes, against the merge of the whole model."""

from __future__ import annotations

import pytest

SCRIPT = """
from collections import OrderedDict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lora_lightning import AdapterError, inject_lora, save_adapter, unload_lora
from lora_lightning.adapters.merge import fold_in
from lora_lightning.injection.tensors import whole

def network():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(words=nn.Embedding(10, 6), up=nn.Linear(6, 9), down=nn.Linear(9, 4)))

kind, dtype = arguments[0], getattr(torch, arguments[1])
config = {"r": 2, "target_modules": ["words", "up", "down"]}

def trained(overflowing=False):
    model = network().to(dtype)
    inject_lora(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    if overflowing:
        model.down.lora_A.data.fill_(1e20)
        model.down.lora_B.data[3] = 1e20  # the last row: not every process holds it
    return model

if rank == 0:
    save_adapter(trained(), out / "good")
    save_adapter(trained(overflowing=True), out / "bad")
dist.barrier()

alone = network().to(dtype)
fold_in(alone, out / "good")

model = network().to(dtype)
mesh = init_device_mesh("cpu", (world,))
if kind == "fsdp":
    fully_shard(model, mesh=mesh)
else:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
before = {name: whole(value.detach()).clone() for name, value in model.named_parameters()}
kinds = {name: (type(value), getattr(value, "placements", None)) for name, value in model.named_parameters()}
try:
    fold_in(model, out / "bad")
except AdapterError as error:
    assert "not be finite in down" in str(error), error
else:
    raise AssertionError("merged what is not finite")
unload_lora(model)
assert all(torch.equal(whole(value.detach()), before[name]) for name, value in model.named_parameters())

fold_in(model, out / "good")
merged = dict(model.named_parameters())
assert merged.keys() == before.keys()
for name, value in alone.named_parameters():
    assert (type(merged[name]), getattr(merged[name], "placements", None)) == kinds[name], name
    assert torch.equal(whole(merged[name].detach()), value), name
assert not torch.equal(merged["up.weight"].full_tensor(), before["up.weight"])
"""


@pytest.mark.parametrize(("kind", "dtype"), [("fsdp", "float32"), ("fsdp", "bfloat16"), ("tensor", "float32")])
def test_parts_of_a_merged_weight_are_those_of_the_merge_made_whole(processes, kind, dtype):
    processes(SCRIPT, kind, dtype)
