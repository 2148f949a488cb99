"""DDP over two real processes: what it sends from rank 0 at its start, and at each forward."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.strategies.broadcast import include_frozen, skip_frozen

SCRIPT = """
import lightning.pytorch as pl
from torch import nn
from lora_lightning import LoraConfig, inject_lora
from lora_lightning.strategies.broadcast import include_frozen, skip_frozen


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.outside = nn.Linear(2, 2)
        self.register_buffer("own", torch.zeros(2))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.net.register_buffer("table", torch.arange(3.0))
        self._ddp_params_and_buffers_to_ignore = ["net.1.num_batches_tracked"]


torch.manual_seed(1)
module = Module()
inject_lora(module.net, LoraConfig(r=2, target_modules=["0", "2"]))
module.outside.requires_grad_(False)
with torch.no_grad():
    module.net[2].weight += rank  # what one rank alone has
    module.net[0].lora_A += rank
left_out = skip_frozen(module)
assert set(left_out) == {
    "outside.weight", "outside.bias", "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.2.bias",
    "net.table",
}, left_out
assert skip_frozen(module) == left_out  # twice is as good as once
# Changed behind its back, to see what travels.
with torch.no_grad():
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor += 10 * rank
ddp = nn.parallel.DistributedDataParallel(module)
state = {name: value.clone() for name, value in module.state_dict().items()}
everyone = [None, None]
dist.all_gather_object(everyone, state)
travelled = {name for name in state if torch.equal(everyone[0][name], everyone[1][name])}
assert travelled == {
    "own", "net.0.lora_A", "net.0.lora_B", "net.2.weight", "net.2.lora_A", "net.2.lora_B", "net.1.running_mean",
    "net.1.running_var", "net.1.num_batches_tracked",
}, travelled
include_frozen(module)
assert module._ddp_params_and_buffers_to_ignore == ["net.1.num_batches_tracked"]
"""


def test_only_what_differs_or_moves_is_sent(processes):
    processes(SCRIPT)


def test_a_process_alone_leaves_the_module_as_it_is():
    module = pl.LightningModule()
    module.net = nn.Linear(2, 2)
    inject_lora(module, LoraConfig(r=1))
    before = dict(vars(module))
    assert skip_frozen(module) == []
    include_frozen(module)
    assert vars(module).keys() == before.keys()
    assert not torch.distributed.is_initialized()


FEW = """
import lightning.pytorch as pl
import pytest
from torch import nn
from torchao.quantization import Int8Tensor, PerRow
import bitsandbytes as bnb
from lora_lightning import AdapterError, LoraConfig, inject_lora
from lora_lightning.strategies.broadcast import skip_frozen


class Module(pl.LightningModule):
    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
        quantised = Int8Tensor.from_hp(self.net[0].weight.detach(), PerRow())
        self.net[0].weight = nn.Parameter(quantised, requires_grad=False)
        self.net[1].weight.data += shift * torch.arange(64)
        self.net.to("cpu")


module = Module(0)
inject_lora(module, LoraConfig(r=2))
assert {"net.0.weight", "net.1.weight"} <= set(skip_frozen(module))
nn.parallel.DistributedDataParallel(module)  # torchao's classes could not be sent
other = Module(rank)
inject_lora(other, LoraConfig(r=2))
with pytest.raises(AdapterError, match="different values in quantised weights, first net.1.weight"):
    skip_frozen(other)
"""


def test_a_quantised_base_is_not_sent_and_has_to_be_the_same(processes):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    processes(FEW)
