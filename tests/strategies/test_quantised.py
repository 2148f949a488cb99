"""Which quantised bases are refused, by layers that have the classes and dtypes of the libraries' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, LoraConfigError, inject_lora
from lora_lightning.strategies.quantised import check_quantised

BOTH = ["FSDPStrategy", "ModelParallelStrategy"]


def _bnb(name: str, storage: torch.dtype) -> nn.Module:
    """A layer as bitsandbytes makes it: half as many packed values of the storage dtype."""

    def forward(self, x):
        return x @ torch.zeros(self.in_features, self.out_features)

    made = type(name, (nn.Linear,), {"__module__": "bitsandbytes.nn.modules", "forward": forward})(8, 8, bias=False)
    made.weight = nn.Parameter(torch.zeros(32, 1).to(storage), requires_grad=False)
    return made


def _model(layer: nn.Module, rest: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.ModuleDict({"layer": layer, "norm": nn.LayerNorm(8, dtype=rest)})


class _Packed(torch.Tensor):
    """A tensor subclass, as torchao's are."""


_Packed.__module__ = "torchao.dtypes"


class _Gathered(_Packed):
    def fsdp_pre_all_gather(self, mesh):
        raise NotImplementedError


_Gathered.__module__ = "torchao.dtypes.nf4tensor"


def _torchao(kind: type) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16).as_subclass(kind), requires_grad=False)
    return _model(layer.to(torch.bfloat16))


def test_four_bit_under_fsdp_wants_one_dtype_for_all():
    check_quantised("FSDPStrategy", _model(_bnb("Linear4bit", torch.bfloat16)))
    for storage, rest in ((torch.uint8, torch.bfloat16), (torch.bfloat16, torch.float32)):
        with pytest.raises(LoraConfigError, match=rf"layer: its 4-bit .* as {storage} .*quant_storage={rest}\)"):
            check_quantised("FSDPStrategy", _model(_bnb("Linear4bit", storage), rest))


def test_adapters_in_float32_do_not_matter_to_fsdp_and_adapted_layers_are_recognised():
    model = _model(_bnb("Linear4bit", torch.bfloat16))
    inject_lora(model, LoraConfig(r=2, target_modules=["layer"]))
    assert model["layer"].lora_A.dtype == torch.float32
    check_quantised("FSDPStrategy", model)
    with pytest.raises(LoraConfigError, match="wrong without an error"):
        check_quantised("ModelParallelStrategy", model)


@pytest.mark.parametrize("strategy", BOTH)
def test_eight_bit_is_refused(strategy):
    with pytest.raises(LoraConfigError, match=f"{strategy} cannot spread layer: .*8"):
        check_quantised(strategy, _model(_bnb("Linear8bitLt", torch.int8)))


def test_tensor_classes():
    for strategy in BOTH:
        with pytest.raises(LoraConfigError, match="torchao _Packed"):
            check_quantised(strategy, _torchao(_Packed))
    check_quantised("ModelParallelStrategy", _torchao(_Gathered))
    with pytest.raises(LoraConfigError, match="cannot flatten"):
        check_quantised("FSDPStrategy", _torchao(_Gathered))


@pytest.mark.parametrize("strategy", [*BOTH, "DDPStrategy", "DeepSpeedStrategy"])
def test_plain_bases_pass_everywhere(strategy, llama):
    check_quantised(strategy, llama)
    inject_lora(llama.to(torch.bfloat16), LoraConfig(r=2))
    check_quantised(strategy, llama)


def test_strategies_that_keep_layers_whole_take_all():
    check_quantised("DDPStrategy", _model(_bnb("Linear8bitLt", torch.int8)))
