"""Layers and models in few bits, as their libraries make them."""

import pytest
import torch
from torch import nn

KINDS = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "torchao-nf4")
LIBRARY = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes"}


def quantised_linear(layer, kind, compute_dtype=None):
    """A plain linear layer as one in few bits, which shares its bias."""
    pytest.importorskip(LIBRARY.get(kind, "torchao"))
    n_in, n_out, has_bias = layer.in_features, layer.out_features, layer.bias is not None
    if kind.startswith("torchao"):
        layer.weight = nn.Parameter(_torchao(layer.weight.detach(), kind), requires_grad=False)
        return layer
    import bitsandbytes as bnb

    if kind == "int8":
        made = bnb.nn.Linear8bitLt(n_in, n_out, has_bias, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(n_in, n_out, has_bias, compute_dtype, quant_type=kind)
        made.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), quant_type=kind, module=made)
    made.bias = layer.bias
    return made.to("cpu")  # which is when they quantise


def _torchao(weight, kind):
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

    if kind == "torchao-int8":
        return Int8Tensor.from_hp(weight, PerRow())
    if kind == "torchao-int4":
        return IntxUnpackedToInt8Tensor.from_hp(weight, (1, 16), torch.int4)
    try:
        from torchao.quantization.quantize_.workflows import NF4Tensor
    except ImportError:  # before 0.18
        from torchao.dtypes import NF4Tensor

    return NF4Tensor.from_tensor(weight, 64, 4)


@pytest.fixture
def quantise():
    """Puts every linear layer of a model but the output head in few bits: quantise(model, kind)."""

    def run(model, kind):
        head = getattr(model, "lm_head", None)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child is not head:
                    setattr(parent, name, quantised_linear(child, kind))
        if kind in LIBRARY:  # as transformers says it of what it has read
            setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
        return model

    return run


@pytest.fixture
def quantised():
    """Makes a plain linear layer one in few bits: quantised(layer, kind, compute_dtype=None)."""
    return quantised_linear
