"""First values of adapters do not depend on what a context makes of torch's defaults, nor on when there is memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, inject_lora, lora_parameters, meta_parameters
from lora_lightning.injection.materialise import places, start_adapters


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_are_the_same_under_any_default_dtype_and_without_memory_first(how, dtype, default_dtype):
    config = LoraConfig(r=4, init_lora_weights=how, target_modules=["0"])

    def build():
        model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float32))
        inject_lora(model, config, seed=3)
        return lora_parameters(model)

    expected = build()
    default_dtype(dtype)
    given = build()
    with meta_parameters():
        late = nn.Sequential(nn.Linear(16, 8, dtype=torch.float32))
    inject_lora(late, config, seed=3)
    assert all(p.is_meta for p in lora_parameters(late).values())
    start_adapters(late, torch.device("cpu"))
    for name, value in expected.items():
        assert torch.equal(given[name], value)
        assert torch.equal(lora_parameters(late)[name], value)
        assert lora_parameters(late)[name].requires_grad


def test_meta_parameters_keep_buffers_and_ties_and_leave_no_trace():
    register = nn.Module.register_parameter
    with meta_parameters():
        one, other = nn.Linear(3, 3), nn.Linear(3, 3)
        other.weight = one.weight
        one.register_buffer("table", torch.arange(3))
    assert nn.Module.register_parameter is register
    assert other.weight is one.weight
    assert one.weight.is_meta
    assert one.table.tolist() == [0, 1, 2]
    model = nn.ModuleList([one, other])
    assert [place.names for place in places(model)] == [["0.weight", "1.weight"], ["0.bias"], ["0.table"], ["1.bias"]]
    with pytest.raises(ZeroDivisionError), meta_parameters():
        raise ZeroDivisionError
    assert nn.Module.register_parameter is register
