"""Adapted parameters that no layer of their own holds: the stacked experts of a mixture, and any other matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.errors import LoraConfigError
from lora_lightning.layers.base import COMPUTED_IN, LoraLayer, adapter_dtype
from lora_lightning.layers.hazards import detached_hook, why_not
from lora_lightning.layers.holder import Showing, hold, let_go


class LoraParameter(LoraLayer, Showing, nn.Module):
    """The adapter of one parameter, as a child of the module that has it: ``W_e + s · B_e A_e`` for each expert ``e``.

    ``lora_A`` is ``(E·r, in)``, one expert after the other, and ``lora_B`` is ``(out, r·E)``, in which the expert
    changes fastest, as in PEFT's files. A parameter of two dimensions is one expert, ``(out, in)``. One of three is
    ``(E, out, in)``, or ``(E, in, out)`` where the module's ``is_transposed`` says so. All experts are computed at
    once; the module that has the parameter sees the sum while it runs.

    Attributes:
        lora_parameter: The parameter's name in the module that has it.
        lora_holder: That module.
        lora_experts: ``E``.
        lora_shape: ``(in, out)`` of an expert.
        lora_transposed: Whether an expert is stored ``(in, out)``.
    """

    lora_kind: ClassVar[str] = "Parameter"
    lora_parameter: str
    lora_holder: nn.Module
    lora_experts: int
    lora_shape: tuple[int, int]
    lora_transposed: bool

    def __init__(self, holder: nn.Module, name: str, r: int, lora_alpha: float, scaling: float) -> None:
        """Make an adapter that has no values yet."""
        super().__init__()
        weight: Tensor = getattr(holder, name)
        *experts, rows, columns = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves the tensor itself empty
        transposed = bool(experts) and bool(getattr(holder, "is_transposed", False))
        count, (n_in, n_out) = (experts or [1])[0], (rows, columns) if transposed else (columns, rows)
        options: dict[str, Any] = {"dtype": adapter_dtype(weight), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(count * r, n_in, **options))
        self.lora_B = nn.Parameter(torch.empty(n_out, r * count, **options))
        vars(self).update(  # past nn.Module, which would make a child of the module around this one
            lora_holder=holder,
            lora_parameter=name,
            lora_experts=count,
            lora_shape=(n_in, n_out),
            lora_transposed=transposed,
        )
        vars(self).update(lora_r=r, lora_alpha=lora_alpha, lora_scaling=scaling, lora_dropout=0.0, lora_enabled=True)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # as of a layer, whose own it is
        """The base's parameter."""
        return getattr(self.lora_holder, self.lora_parameter)  # FSDP leaves views of its own there

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of an expert."""
        return vars(layer)["lora_shape"]

    def lora_place(self, name: str) -> tuple[nn.Module, str]:
        """The module that has the parameter, and its name there."""
        return self.lora_holder, self.lora_parameter

    def lora_meant(self, name: str) -> str:
        """The parameter's own name, as configs have it."""
        return f"{name.rpartition('.')[0]}.{self.lora_parameter}".removeprefix(".")

    def lora_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(E, rows, r)`` and ``(E, r, columns)``, which times ``s`` give the updates as the base is stored."""
        a = self.lora_A.to(dtype).reshape(self.lora_experts, self.lora_r, -1)
        b = self.lora_B.to(dtype).reshape(-1, self.lora_r, self.lora_experts).permute(2, 0, 1)
        return (a.mT, b.mT) if self.lora_transposed else (b, a)

    def lora_value(self, weight: Tensor) -> Tensor:
        """``W + s · B A``, in the dtype and the shape of the parameter.

        Raises:
            LoraConfigError: If the parameter is spread over processes while it is computed with.
        """
        if isinstance(weight, DTensor) and not isinstance(self.lora_A, DTensor):
            raise LoraConfigError(
                f"{self.lora_parameter} of a {type(self.lora_holder).__name__.removeprefix('Lora')} is spread over "
                "processes while it is computed with, as tensor and expert parallelism do it, and adapters of "
                "parameters (target_parameters) do not follow that: use DDP, or FSDP2, which gathers weights before"
            )
        left, right = self.lora_factors(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):  # a parameter keeps its dtype
            if weight.ndim == 2:
                return torch.addmm(weight, left[0], right[0], alpha=self.lora_scaling)
            return torch.baddbmm(weight, left, right, alpha=self.lora_scaling)

    def lora_weight_delta(self) -> Tensor:
        """``s · B A`` in the shape of the parameter."""
        left, right = self.lora_factors(self.lora_A.dtype)
        delta = self.lora_scaling * (left @ right)
        return delta if self.weight.ndim == 3 else delta[0]

    def extra_repr(self) -> str:
        """The parameter's name, rank and scale."""
        return f"{self.lora_parameter}, r={self.lora_r}, scaling={self.lora_scaling:g}"


def adapt_parameter(holder: nn.Module, name: str, r: int, lora_alpha: float, scaling: float) -> LoraParameter:
    """Give a module's own parameter an adapter: its values, uninitialised, and the class that sees the sum.

    Args:
        holder: The module that has the parameter.
        name: The parameter's name in it.
        r: Rank of each expert's update.
        lora_alpha: Numerator of the scale, kept for the record.
        scaling: The scale ``s``.
    """
    with detached_hook(holder):
        layer = LoraParameter(holder, name, r, lora_alpha, scaling)
        hold(holder, child_name(name), layer)
    return layer


def restore_parameter(layer: LoraParameter) -> None:
    """Take the adapter of a parameter off again."""
    with detached_hook(layer.lora_holder):
        let_go(layer.lora_holder, layer)


def child_name(parameter: str) -> str:
    """The name of the child that adapts a parameter."""
    return f"lora_{parameter}"


def parameters_of_holder(holder: nn.Module) -> list[LoraParameter]:
    """The adapters of a module's own parameters, in the order in which it has these."""
    children = (holder._modules.get(child_name(name)) for name in holder._parameters)
    return [child for child in children if isinstance(child, LoraParameter)]


def why_not_parameter(holder: nn.Module, name: str) -> str | None:
    """Why a parameter cannot be adapted, with the remedy; None where nothing stands in the way."""
    weight: Tensor = getattr(holder, name)
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if len(shape) not in (2, 3):
        return f"its shape is {shape}; parameters of two and of three dimensions can be"
    if weight.dtype not in COMPUTED_IN:
        return f"its dtype is {weight.dtype}: load the model in bfloat16, or another dtype that is computed in"
    if isinstance(holder, LoraLayer):
        return "its layer is adapted already: name the layer in target_modules or the parameter here, not both"
    return why_not(holder)
