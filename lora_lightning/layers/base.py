"""What every adapted layer has in common: the adapter's parameters beside the base's, and a switch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.errors import LoraConfigError

# A mixin beside a module class at run time; to a type checker it is the module that it is part of.
if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


COMPUTED_IN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are numbers as they stand; what is kept in fewer bits goes with scales."""


class LoraLayer(_Module):
    """Mixin of every adapted layer: a layer that kept its identity and got ``lora_A`` and ``lora_B`` of its own.

    The update of the weight is ``s · B A`` with ``lora_A`` of shape ``(r, in)`` and ``lora_B`` of shape ``(out, r)``.
    A layer of this kind is made from a plain one by :func:`lora_lightning.layers.adapt`, which changes its class in
    place, and made plain again by :func:`lora_lightning.layers.restore`. ``torch.fx`` and TorchScript cannot follow a
    changed class: merge the adapter first.

    Attributes:
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        lora_r: The rank.
        lora_alpha: Numerator of the scale.
        lora_scaling: The scale ``s``.
        lora_dropout: Probability of dropping an input of ``A`` while the layer is in train mode.
        lora_enabled: False gives the base layer's output.
        lora_base_class: What a plain layer of this kind is.
        lora_drops: Whether ``lora_dropout`` has a place in the kind at all.
        lora_starts: Which ``init_lora_weights`` the kind can begin with; None where it is any.
        lora_reads: The methods of that class whose formula a class with a forward of its own takes for known.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_r: int
    lora_alpha: float
    lora_scaling: float
    lora_dropout: float
    lora_enabled: bool
    lora_kind: ClassVar[str]
    lora_base_class: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...]]
    lora_reads: ClassVar[tuple[str, ...]] = ("forward",)
    lora_parameter_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    lora_starts: ClassVar[tuple[bool | str, ...] | None] = None
    lora_drops: ClassVar[bool] = True
    lora_still: tuple[str, ...] = ()
    """Those of the adapter's parameters that do not train."""

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of a plain or adapted layer of this kind, from its attributes rather than its weight.

        A sharding engine may leave the weight empty.
        """
        raise NotImplementedError

    @classmethod
    def lora_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that an adapter of rank ``r`` adds to a layer."""
        n_in, n_out = cls.lora_sides(layer)
        return {"lora_A": (r, n_in), "lora_B": (n_out, r)}

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """Why a layer cannot have this variant, beside what hinders any; None where nothing does."""
        return None

    @classmethod
    def lora_rank_hindrance(cls, layer: nn.Module, r: int) -> str | None:
        """Why a layer cannot have an adapter of rank ``r``; None where nothing stands in the way."""
        return None

    @classmethod
    def lora_largest_rank(cls, layer: nn.Module) -> int:
        """The rank beyond which an update gains nothing."""
        return min(cls.lora_sides(layer))

    @staticmethod
    def lora_weight_of(layer: nn.Module) -> Tensor:
        """The weight of a plain layer of this kind."""
        return cast("Tensor", layer.weight)

    @property
    def lora_own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: getattr(self, name) for name in self.lora_parameter_names}

    def lora_derived(self) -> dict[str, Tensor]:
        """First values of parameters that follow from the weight, ``A`` and ``B``; whole on every process."""
        return {}

    def lora_delta(self, x: Tensor) -> Tensor:
        """What the adapter adds to the base layer's output for the input ``x``."""
        raise NotImplementedError

    def lora_weight_delta(self) -> Tensor:
        """``s · B A`` in the shape of the base weight, in the adapter's dtype."""
        raise NotImplementedError

    def lora_merged(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The weight of a plain layer that gives this one's outputs, from the base's and ``s · B A`` in its shape."""
        return weight + delta

    def lora_shown(self) -> dict[str, Tensor]:
        """What a parent that reads the layer's tensors, and never calls it, has to find there; with gradients."""
        return {"weight": self.lora_merged(self.weight, self.lora_weight_delta()).to(self.weight.dtype)}

    def lora_along(self, values: Tensor) -> Tensor:
        """One value an output, ``(out,)``, in a shape to be put beside an output."""
        return values

    # ---- merging, by the names of the base's tensors that it changes: those of a child have a dot in them

    lora_folds: tuple[str, ...] = ("weight",)

    def lora_place(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a tensor of :attr:`lora_folds`, and the tensor's name there."""
        path, _, local = name.rpartition(".")
        return self.get_submodule(path), local

    def lora_meant(self, name: str) -> str:
        """The name by which a config means the layer, from its own."""
        return name

    def lora_unmergeable(self) -> str | None:
        """Why the adapter cannot be folded into the base, said of the layer; None where it can."""
        kept = self.lora_weight_of(self).dtype
        if kept in COMPUTED_IN:
            return None
        return (
            f"keeps its weight in {kept}, and only its class knows which numbers that stands for: keep the adapter "
            "beside the base, or merge it into the base of full precision"
        )

    def lora_delta_of(self, name: str) -> Tensor:
        """What merging adds to a tensor of :attr:`lora_folds` (``weight`` goes through :meth:`lora_merged`)."""
        return self.lora_weight_delta()

    def lora_base_value(self, name: str) -> Tensor:
        """A tensor of :attr:`lora_folds` as numbers: a quantised layer's dequantised."""
        return operator.attrgetter(name)(self)

    def lora_write(self, name: str, value: Tensor) -> None:
        """Give a tensor of :attr:`lora_folds` a value, rounded once: a quantised layer quantises it again."""
        operator.attrgetter(name)(self).detach().copy_(value)

    def lora_keep(self, name: str) -> Callable[[], object]:
        """What puts a tensor of :attr:`lora_folds` back as it is now, to the bit; its copy lies in host memory."""
        target = operator.attrgetter(name)(self).detach()
        here = target.to_local() if isinstance(target, DTensor) else target
        kept = here.to("cpu", copy=True)
        return functools.partial(here.copy_, kept)

    weight: Any  # the base's: a tensor, or what a quantised layer keeps instead

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the adapter's, whatever the base class does with its input."""
        out = super().forward(*args, **kwargs)
        return out + self.lora_delta(input_of(self, out, args, kwargs)).to(out.dtype) if self.lora_enabled else out

    def extra_repr(self) -> str:
        """The base layer's description with rank and scale behind it."""
        return f"{super().extra_repr()}, r={self.lora_r}, scaling={self.lora_scaling:g}"

    @property
    def _active_dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0


def input_of(layer: nn.Module, out: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input to which an adapter gives its update: a layer's first argument, or the one named ``input``.

    Raises:
        LoraConfigError: If what the layer made of it is not a tensor, to which an update could be added.
    """
    if not isinstance(out, Tensor):
        raise LoraConfigError(
            f"a layer of class {type(layer).__name__.removeprefix('Lora')} gives a {type(out).__name__} where an "
            "adapter adds to a tensor (routers of experts do): leave it out, with its name in exclude_modules"
        )
    return args[0] if args else kwargs["input" if "input" in kwargs else next(iter(kwargs))]


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of adapters beside a weight: float32 where the base is of half precision or quantised, else the same.

    Small steps in a half-precision parameter round to nothing, so the trained copy is a full one; the arithmetic is
    done in the input's dtype all the same. (Lightning's precision ``bf16-true`` casts all parameters, these too.)
    """
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
