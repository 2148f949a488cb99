"""A start that changes the base's weights, where processes have parts of them (``fully_shard``)."""

import torch
from safetensors.torch import save_file
from torch import nn

from lora_lightning import LoraConfig, inject_lora, lora_state_dict

SCRIPT = """
import copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lora_lightning import LoraConfig, inject_lora, load_base, lora_disabled, lora_state_dict, meta_parameters
from lora_lightning.injection.state import load_lora_state, lora_layers
from lora_lightning.injection.tensors import whole

torch.manual_seed(3)
net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))  # 9 rows: one process has more than the other
x = torch.randn(4, 6)
base = net(x).detach()
fully_shard(net, mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=True)
inject_lora(net, LoraConfig(r=2, init_lora_weights=arguments[0]), seed=1)
begun = net(x).detach()
with lora_disabled(net):
    off = net(x).detach()
state = {name: value.clone() for name, value in lora_state_dict(net).items()}
load_lora_state(net, {name: whole(value) for name, value in state.items()}, "it")
again = net(x).detach()
net.reshard()
weights = {name: whole(layer.weight.detach()) for name, layer in lora_layers(net)}
with meta_parameters():
    torch.manual_seed(3)
    empty = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
inject_lora(empty, LoraConfig(r=2, init_lora_weights=arguments[0]), seed=1)
fully_shard(empty, mesh=init_device_mesh("cpu", (world,)))
load_base(empty, arguments[1])
filled = {name: whole(value) for name, value in lora_state_dict(empty).items()}
found = {"base": base, "begun": begun, "off": off, "again": again, "late": empty(x).detach(), "weights": weights}
found |= {"filled": filled, "state": {name: whole(value) for name, value in state.items()}}
torch.save(found, out / f"{rank}.pt")
"""


def test_every_process_begins_with_the_whole_decomposition(processes, tmp_path):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    inject_lora(net, LoraConfig(r=2, init_lora_weights="pissa_niter_2"), seed=1)
    folder = processes(SCRIPT, "pissa_niter_2", tmp_path)
    for rank in (0, 1):
        found = torch.load(folder / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["begun"], found["base"], atol=1e-5, rtol=1e-5)
        assert torch.equal(found["off"], found["base"])
        assert torch.equal(found["again"], found["begun"])
        for name, value in lora_state_dict(net).items():
            torch.testing.assert_close(found["state"][name], value.detach(), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(found["filled"][name], value.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["late"], found["base"], atol=1e-5, rtol=1e-5)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, net.get_submodule(name).weight.detach(), atol=1e-6, rtol=1e-6)
