"""``nn.Linear`` layers that carry the adapters of many jobs at once, each for the rows of its own slot.

A batch is the slots' batches one after the other, all of as many rows and as wide as the widest. What is not a row of
the batch never comes to these layers: nothing of one slot reaches another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.layers.dropout import draw, without
from lora_lightning.layers.group import LoraGroup, dissolve
from lora_lightning.layers.linear import LoraLinear
from lora_lightning.layers.made import declare, made_class, plain_class
from lora_lightning.layers.packed_functional import Packed, packed_linears

Drawing = Callable[[int], AbstractContextManager[None]]


@dataclass
class Seating:
    """Which slots the forward at hand is of, and how their rows lie in it; one object for all layers of a model.

    Attributes:
        slots: Numbers of the slots, in the order of their rows.
        rows: How many rows each has.
        widths: How many tokens a row of each has of its own; the rest of a row, up to the widest, is padding.
        dropout: The probability of each slot; 0 outside training.
        drawing: Makes torch's generator that of a slot's job, for the time of a draw.
    """

    slots: tuple[int, ...] = ()
    rows: int = 0
    widths: tuple[int, ...] = ()
    dropout: tuple[float, ...] = ()
    drawing: Drawing | None = None

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return max(self.widths)

    def check(self, x: Tensor) -> None:
        """Refuse an input whose rows are not those of the batch, and so of nobody knows which slot."""
        expected = (len(self.slots) * self.rows, self.width)
        if x.dim() != 3 or x.shape[:2] != expected:
            raise LoraConfigError(
                f"an adapted layer is called on a tensor of shape {tuple(x.shape)} where the batch of "
                f"{len(self.slots)} jobs has {expected[0]} rows of {expected[1]} tokens: which row is whose cannot be "
                "told. A model that picks tokens out on their way (a mixture of experts does) is trained a job at a "
                "time: leave out hydra/launcher=lora_packed"
            )

    def draw(self, like: Tensor, features: int, adapted: Sequence[bool]) -> Tensor | None:
        """What dropout leaves out of an input, ``(n·rows, width, features)``: each slot's draw is that of its own run.

        Args:
            like: A tensor of the dtype and on the device of the input.
            features: Its last dimension.
            adapted: For each slot there is, whether any layer on this input has its adapter.

        Returns:
            Places in the flattened input, ``(k,)``, or a mask, ``(n·rows·width, features)``; None if nothing is drawn.
        """
        drawn: dict[int, Tensor] = {}
        for place, (slot, p, width) in enumerate(zip(self.slots, self.dropout, self.widths, strict=True)):
            if p and adapted[slot]:
                assert self.drawing is not None
                alone = like.new_empty(()).expand(self.rows * width, features)
                with self.drawing(slot):
                    drawn[place] = draw(alone, p)
        if not drawn:
            return None
        if like.device.type == "cpu" and all(each.dtype != torch.bool for each in drawn.values()):
            return torch.cat([self._placed(each, place, features) for place, each in drawn.items()])
        mask = torch.zeros(len(self.slots), self.rows, self.width, features, dtype=torch.bool, device=like.device)
        for place, each in drawn.items():
            width, p = self.widths[place], self.dropout[place]
            mask[place, :, :width] = _as_mask(each, self.rows * width, features, p).view(self.rows, width, features)
        return mask.view(-1, features)

    def _placed(self, places: Tensor, place: int, features: int) -> Tensor:
        """Places in one slot's input as places in the input of all."""
        own, whole = self.widths[place] * features, self.width * features
        begin = place * self.rows * whole
        if own == whole or self.rows == 1:
            return places + begin if begin else places
        return places + places.div(own, rounding_mode="floor").mul_(whole - own).add_(begin)


def _as_mask(dropped: Tensor, tokens: int, features: int, p: float) -> Tensor:
    if dropped.dtype == torch.bool:
        return dropped
    return without(torch.ones(tokens, features, device=dropped.device), dropped, p) == 0


class Stack:
    """The adapters of all slots on layers that share one input.

    The slots' own ``lora_A`` and ``lora_B`` become views into it (``a[i, :r]`` and ``b[i, :r].t()``), so that their
    optimizers move what is here, and what fills smaller ranks up never moves.

    Args:
        layers: The layers of the packed model.
        adapters: For each slot, its own layer in the place of each of these; None where it has no adapter there.
        seating: Of the model.

    Attributes:
        a: ``(N, R, in)``: a slot's ``A`` of all layers, below each other.
        bs: ``B`` transposed of each layer, ``(N, r, out)``.
    """

    def __init__(
        self, layers: Sequence[PackedLoraLinear], adapters: Sequence[Sequence[LoraLinear | None]], seating: Seating
    ) -> None:
        self.seating = seating
        self.adapters = adapters
        self.adapted = [any(each is not None for each in row) for row in adapters]
        by_layer = [[each for each in column if each is not None] for column in zip(*adapters, strict=True)]
        self.ranks = [max(each.lora_r for each in column) for column in by_layer]
        options: Any = {"dtype": by_layer[0][0].lora_A.dtype, "device": by_layer[0][0].lora_A.device}
        self.a = torch.zeros(len(adapters), sum(self.ranks), layers[0].in_features, **options)
        self.bs = [
            torch.zeros(len(adapters), rank, layer.out_features, **options)
            for rank, layer in zip(self.ranks, layers, strict=True)
        ]
        for place, layer in enumerate(layers):
            vars(layer).update(lora_stack=self, lora_place=place)
        self._scaling = torch.zeros(len(adapters), 1, sum(self.ranks), dtype=torch.float64)
        self._scales: dict[Any, Tensor] = {}
        self._take_in()
        self.a.requires_grad_(any(each.lora_A.requires_grad for column in by_layer for each in column))
        for b, column in zip(self.bs, by_layer, strict=True):
            b.requires_grad_(any(each.lora_B.requires_grad for each in column))

    def _take_in(self) -> None:
        for slot, place, adapter in self._members():
            r, begin = adapter.lora_r, sum(self.ranks[:place])
            self._scaling[slot, 0, begin : begin + r] = adapter.lora_scaling
            _point(adapter.lora_A, self.a[slot, begin : begin + r])
            _point(adapter.lora_B, self.bs[place][slot, :r].t())

    def _members(self) -> list[tuple[int, int, LoraLinear]]:
        return [
            (slot, place, adapter)
            for slot, row in enumerate(self.adapters)
            for place, adapter in enumerate(row)
            if adapter is not None
        ]

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in (self.a, *self.bs) if tensor.requires_grad]

    def gradients(self, of: Mapping[int, Tensor | None]) -> list[tuple[int, nn.Parameter, Tensor]]:
        """Slot, parameter and gradient, a view in the parameter's own layout.

        Args:
            of: The gradient of each of :attr:`leaves`, by the leaf's ``id``.
        """
        da = of.get(id(self.a))
        found = []
        for slot, place, adapter in self._members():
            r, begin = adapter.lora_r, sum(self.ranks[:place])
            db = of.get(id(self.bs[place]))
            if da is not None and adapter.lora_A.requires_grad:
                found.append((slot, adapter.lora_A, da[slot, begin : begin + r]))
            if db is not None and adapter.lora_B.requires_grad:
                found.append((slot, adapter.lora_B, db[slot, :r].t()))
        return found

    def chosen(self, layers: Sequence[PackedLoraLinear]) -> tuple[Tensor, Tensor, list[Packed]]:
        """``A``, the scales and the rest of layers, for the slots of the forward at hand."""
        places = [layer.lora_place for layer in layers]
        whole = len(places) == len(self.ranks)
        a, scales = self._of_slots(self.a), self._scales_of_slots()
        if not whole:
            ends = [sum(self.ranks[: place + 1]) for place in places]
            spans = [slice(end - self.ranks[place], end) for place, end in zip(places, ends, strict=True)]
            a = torch.cat([a[:, span] for span in spans], dim=1)
            scales = torch.cat([scales[:, :, span] for span in spans], dim=2)
        packed = [Packed(layer.weight, layer.bias, self._of_slots(self.bs[layer.lora_place])) for layer in layers]
        return a, scales, packed

    def _of_slots(self, tensor: Tensor) -> Tensor:
        slots = self.seating.slots
        first, last = slots[0], slots[-1] + 1
        if slots == tuple(range(first, last)):
            return tensor if len(slots) == len(tensor) else tensor[first:last]
        return tensor[list(slots)]

    def _scales_of_slots(self) -> Tensor:
        key = (self.seating.slots, self.seating.dropout)
        if key not in self._scales:
            kept = torch.tensor([1 - p for p in self.seating.dropout], dtype=torch.float64).view(-1, 1, 1)
            scales = self._scaling[list(self.seating.slots)] / kept
            self._scales[key] = scales.to(self.a.device, self.a.dtype)
        return self._scales[key]

    def draw(self, x: Tensor) -> Tensor | None:
        """What dropout leaves out of the layers' input."""
        return self.seating.draw(x, self.a.shape[-1], self.adapted)


def _point(parameter: nn.Parameter, view: Tensor) -> None:
    """Let a parameter, as it is, live in other memory."""
    with torch.no_grad():
        view.copy_(parameter)
    parameter.data = view
    if parameter.grad is not None and parameter.grad.stride() != view.stride():
        parameter.grad = torch.empty_like(view).copy_(parameter.grad)  # fused kernels go through memory as it lies


class PackedLoraLinear(nn.Linear):
    """``nn.Linear`` with an adapter for each slot, ``y_i = x_i Wᵀ + b + s_i · (drop_i(x_i) A_iᵀ) B_iᵀ``.

    Attributes:
        lora_group: The layers that its parent calls on the same input, with which it shares its stack.
        lora_stack: Where its adapters are.
        lora_place: Which of the stack's layers it is.
    """

    lora_group: LoraGroup | None = None
    lora_stack: Stack
    lora_place: int
    lora_enabled = True
    _active_dropout = 0.0  # of no interest to a group: each slot has its own

    @property
    def lora_A(self) -> Tensor:
        """The stack of ``A``."""
        return self.lora_stack.a

    @property
    def lora_B(self) -> Tensor:
        """The stack of ``B``."""
        return self.lora_stack.bs[self.lora_place]

    def forward(self, input: Tensor) -> Tensor:
        """``(n·rows, T, in) -> (n·rows, T, out)``."""
        if self.lora_group is not None:
            return self.lora_group.output(self, input)
        return self.lora_together(input, [self])[0]

    @staticmethod
    def lora_together(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs of layers on one input: ``(n·rows, T, in) -> (n·rows, T, out)`` each."""
        stack: Stack = layers[0].lora_stack
        stack.seating.check(x)
        a, scales, packed = stack.chosen(layers)
        return packed_linears(x, stack.draw(x), scales, a, packed)


def pack(layer: nn.Module) -> None:
    """Change a plain linear layer to one that can have a :class:`Stack`."""
    plain = type(layer)
    packed = declare(PackedLoraLinear, plain) if plain is nn.Linear else made_class(PackedLoraLinear, plain)
    layer.__class__ = packed  # type: ignore[assignment]


def unpack(layer: nn.Module) -> None:
    """Make it plain again."""
    dissolve(layer)
    layer.__class__ = plain_class(layer)  # type: ignore[assignment]
    for name in ("lora_stack", "lora_place"):
        vars(layer).pop(name, None)
