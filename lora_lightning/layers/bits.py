"""Weights that are kept in few bits: read as numbers for a moment, and made anew from numbers in the same way.

Three kinds are known: bitsandbytes' layers of 4 bits and of 8, and weights of torchao's tensor classes. No library is
imported here: a layer of theirs exists only where they have been.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import AdapterError


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is a linear one whose weight is in few bits, or will be once it is on its device."""
    return isinstance(layer, nn.Linear) and _kind_of(layer) is not None


def bits_of(layer: nn.Module) -> Bits | None:
    """A layer's weight in few bits, sharing its memory; None where it is plain numbers (still)."""
    kind = _kind_of(layer)
    return None if kind is None else kind.of(layer)


def values_of(parameter: Tensor) -> Tensor:
    """What lies in memory of a parameter, in bits as they were made; of a class made of several tensors the first."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return FourBits(parameter.data, state).in_order().data
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.detach()
    names, _ = parameter.__tensor_flatten__()
    return values_of(getattr(parameter, names[0]))


_PACKS = "support_avx512bf16_for_cpu"
_KEPT = "_lora_packs"


def keep_order(model: nn.Module) -> None:
    """Have every layer of 4 bits in a model lie as it was made, in inference too.

    On some CPUs bitsandbytes lays them otherwise at the first inference, scales rounded, and reads that by a kernel
    that has no gradient: what lies below such a layer, adapted or not, would then learn nothing, without an error.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and _kind_of(layer) is FourBits and _KEPT not in vars(layer):
            vars(layer)[_KEPT] = vars(layer).get(_PACKS, False)
            vars(layer)[_PACKS] = False
            if (bits := FourBits.of(layer)) is not None and bits.in_order() is not bits:
                bits.in_order().put(layer)


def leave_order(model: nn.Module) -> None:
    """Undo :func:`keep_order`: bitsandbytes may lay them as it likes again."""
    for layer in model.modules():
        if _KEPT in vars(layer):
            vars(layer)[_PACKS] = vars(layer).pop(_KEPT)


class FourBits(NamedTuple):
    """bitsandbytes' ``Linear4bit``: two values of a code (nf4, fp4) in a byte, blocks with a scale each."""

    data: Tensor
    """``(n, 1)``."""
    state: Any
    """Scales, code and shape, a ``QuantState``."""

    @classmethod
    def of(cls, layer: nn.Module) -> FourBits | None:
        """As :func:`bits_of`."""
        weight = cast("Tensor", layer.weight)
        # Engines that put plain tensors in the place of the weight leave the layer its state.
        state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
        return None if state is None else cls(weight.data, state)

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, ``(out, in)``, in a dtype or in the one it had before."""
        weight = sys.modules["bitsandbytes"].functional.dequantize_4bit(*self.in_order())
        return weight if dtype is None else weight.to(dtype)

    def in_order(self) -> FourBits:
        """The same as it was made; inference on some CPUs lays it otherwise, and its scales as one number each."""
        if not getattr(self.state, "packing_format_for_cpu", False):
            return self
        convert = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        return FourBits(*convert(self.data, copy.copy(self.state)))

    def like(self, weight: Tensor) -> FourBits:
        """Another weight, ``(out, in)``, in bits as these."""
        old = self.in_order().state
        data, state = sys.modules["bitsandbytes"].functional.quantize_4bit(
            weight.to(torch.float32).contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=self.data.dtype,
        )
        state.dtype = old.dtype
        return FourBits(data, state)

    def put(self, layer: nn.Module) -> None:
        """Let this be a layer's weight."""
        weight = cast("Any", layer.weight)
        weight.data, weight.quant_state = self
        vars(layer)["quant_state"] = self.state


class EightBits(NamedTuple):
    """bitsandbytes' ``Linear8bitLt``: whole numbers from -127 to 127, rows with a scale each."""

    data: Tensor
    """``(out, in)``."""
    scale: Tensor
    """The largest absolute value of each row, ``(out,)``."""

    @classmethod
    def of(cls, layer: nn.Module) -> EightBits | None:
        """As :func:`bits_of`."""
        weight, state = cast("Any", layer.weight), cast("Any", layer.state)
        scale = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
        return None if weight.dtype != torch.int8 or scale is None else cls(weight.data, scale)

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, ``(out, in)``; in float32 where no dtype is told."""
        return self.data.to(dtype or torch.float32).mul_(self.scale.unsqueeze(1) / 127)

    def like(self, weight: Tensor) -> EightBits:
        """Another weight, ``(out, in)``, in bits as these."""
        quantise = sys.modules["bitsandbytes"].functional.int8_vectorwise_quant
        data, scale, _ = quantise(weight.to(torch.float16).contiguous())
        return EightBits(data, scale)

    def put(self, layer: nn.Module) -> None:
        """Let this be a layer's weight."""
        weight, state = cast("Any", layer.weight), cast("Any", layer.state)
        state.reset_grads()  # what the last forward took over from the weight
        weight.data = weight.CB = self.data
        weight.SCB = self.scale


class TensorClass(NamedTuple):
    """A weight of one of torchao's tensor classes, which looks as wide as it was."""

    weight: Any
    """``(out, in)``."""

    @classmethod
    def of(cls, layer: nn.Module) -> TensorClass:
        """As :func:`bits_of`."""
        return cls(cast("Tensor", layer.weight).detach())

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, ``(out, in)``, in a dtype or in the one it seems to have."""
        dtype = self.weight.dtype if dtype is None else dtype
        if hasattr(self.weight, "get_original_weight"):  # NF4
            return self.weight.get_original_weight().to(dtype)
        if type(self.weight).dequantize is not Tensor.dequantize:
            return self.weight.dequantize().to(dtype)
        # Made for one kernel only, and it goes forward: every row of Wᵀ is what it makes of a unit vector.
        eye = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return F.linear(eye, self.weight).t().to(dtype)

    def like(self, weight: Tensor) -> TensorClass:
        """Another weight, ``(out, in)``, in bits as these.

        Raises:
            AdapterError: If it is not known how its class makes them.
        """
        name = type(self.weight).__name__
        if name not in _TORCHAO:
            raise AdapterError(
                f"a weight of torchao's {name} cannot be made anew from numbers here (one of {', '.join(_TORCHAO)} "
                "can): keep the adapter beside the base, or merge it into the base that is not quantised"
            )
        return TensorClass(_TORCHAO[name](self.weight, weight.to(self.weight.dtype).contiguous()))

    def put(self, layer: nn.Module) -> None:
        """Let this be a layer's weight."""
        before = cast("Tensor", layer.weight)
        layer._parameters["weight"] = nn.Parameter(self.weight, requires_grad=before.requires_grad)


Bits = FourBits | EightBits | TensorClass


def _kind_of(layer: nn.Module) -> type[FourBits] | type[EightBits] | type[TensorClass] | None:
    theirs = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if theirs is not None and isinstance(layer, theirs.Linear4bit):
        return FourBits
    if theirs is not None and isinstance(layer, theirs.Linear8bitLt):
        return EightBits
    kind = type(layer._parameters.get("weight"))
    return TensorClass if kind.__module__.partition(".")[0] == "torchao" else None


def _nf4(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_tensor(weight, old.block_size, old.scaler_block_size)


def _int8(old: Any, weight: Tensor) -> Tensor:
    """Its scales may be of a whole weight, of rows or of groups in them."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    rows, columns = old.block_size
    granularity: Any = PerGroup(columns) if columns < weight.shape[1] else PerRow() if rows == 1 else PerTensor()
    of_inputs = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    return type(old).from_hp(weight, granularity, **{key: getattr(old, key) for key in of_inputs if hasattr(old, key)})


def _intx(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight, old.block_size, old.target_dtype, activation_quantization=old.activation_quantization
    )


_TORCHAO: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "NF4Tensor": _nf4,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}
