"""Layers that compute each row of a batch with an adapter of its own, for inference.

The base layer works on all rows at once. What an adapter adds is computed for its rows alone: with ``A`` and ``B``
looked up for each row where the layers are linear, an adapter at a time elsewhere. Rows of the base are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError, did_you_mean
from lora_lightning.layers.base import input_of
from lora_lightning.layers.dora import DoraLayer
from lora_lightning.layers.embedding import LoraOverEmbedding
from lora_lightning.layers.hazards import detached_hook
from lora_lightning.layers.linear import LoraOverLinear
from lora_lightning.layers.made import made_class, plain_class

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

BASE = "__base__"
"""The name of no adapter: rows of the base model."""


class Rows:
    """Whose each row of a batch is; one object for all layers of a model.

    Args:
        names: An adapter's name, or ``"__base__"``, for each row.
        known: The adapters that the layers have.
        beams: How many rows generation makes of each: ``num_beams``, or ``num_return_sequences`` where it samples.
            The encoder of an encoder-decoder model has each once all the same.
    """

    def __init__(self, names: Sequence[str], known: Sequence[str], beams: int = 1) -> None:
        self.known = tuple(known)
        self.beams = beams
        self.assign(names)

    def assign(self, names: Sequence[str]) -> None:
        """Say whose the rows of the next batch are.

        Raises:
            AdapterError: If a name is none of those that were named at first.
        """
        if isinstance(names, str) or not names:
            raise AdapterError(f"rows need a list with a name for each row of the batch, got {names!r}")
        for name in names:
            if name != BASE and name not in self.known:
                raise AdapterError(
                    f"no adapter {name!r} for a row{did_you_mean(name, self.known)}; there are "
                    f"{', '.join(self.known) or 'none'}, and {BASE!r} for the base model"
                )
        self.names = tuple(names)
        self._found: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._joined: dict[tuple[int, torch.device, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor, layer: str = "a layer") -> dict[str, Tensor]:
        """Numbers of the rows of ``x`` by their adapter, ``(k,)`` int64 each; none for the base.

        Args:
            x: What a layer is called on.
            layer: The layer's name, for messages.

        Raises:
            AdapterError: If ``x`` has other rows than were named.
        """
        expected = (len(self.names), len(self.names) * self.beams)
        if not x.dim() or len(x) not in expected:
            raise AdapterError(
                f"{layer} is called on a tensor of shape {tuple(x.shape)} where adapters are named for "
                f"{expected[0]} rows{f', each {self.beams} times' if self.beams > 1 else ''}: {_remedy(x)}"
            )
        key = (len(x), x.device)
        if key not in self._found:
            by_name: dict[str, list[int]] = {}
            repeats = len(x) // len(self.names)
            for row in range(len(x)):
                by_name.setdefault(self.names[row // repeats], []).append(row)
            by_name.pop(BASE, None)
            self._found[key] = {name: torch.tensor(rows, device=x.device) for name, rows in by_name.items()}
        return self._found[key]

    def joined(self, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """The rows of ``x`` that some adapters have, ``(k,)``, and the number of each one's in :attr:`known`."""
        key = (len(x), x.device, names)
        if key not in self._joined:
            found = [self.of(x)[name] for name in names]
            numbers = [torch.full_like(rows, self.known.index(name)) for name, rows in zip(names, found, strict=True)]
            self._joined[key] = (torch.cat(found), torch.cat(numbers))
        return self._joined[key]


def _remedy(x: Tensor) -> str:
    """What to do about a layer that is called on other rows than were named."""
    if x.dim() and len(x) > 1:
        return "give a name for each row, and beams=num_beams to rows() where generation repeats them"
    return (
        "unless that is the whole batch, the layer has no rows, as it computes once for all of them (positions, say): "
        "leave it out of target_modules, or run the adapters one after the other"
    )


class PerRow(_Module):
    """Over a plain layer: its rows get the outputs that each one's adapter would give them.

    Attributes:
        lora_rows: Whose the rows are.
        lora_name: The layer's name, for messages.
        lora_stack: The low-rank matrices of those adapters whose update is a product with them.
        lora_twins: For each other adapter that has the layer, the layer with that adapter, over the same weight.
    """

    lora_rows: Rows
    lora_name: str
    lora_stack: RowStack
    lora_twins: Mapping[str, nn.Module]

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """Asked by bitsandbytes before it lays a weight out anew for inference, scales rounded: the base stays."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the plain layer's; rows are the first dimension."""
        if self.training:
            raise AdapterError("an adapter for each row is for inference: call model.eval() first")
        out: Tensor = super().forward(*args, **kwargs)
        x = input_of(self, out, args, kwargs)
        by_name = self.lora_rows.of(x, self.lora_name)
        if added := tuple(name for name in by_name if name in self.lora_stack.names):
            rows, numbers = self.lora_rows.joined(x, added)
            out = out.index_add(0, rows, self.lora_stack.delta(x.index_select(0, rows), numbers).to(out.dtype))
        for name, rows in by_name.items():
            if name in self.lora_twins:
                out = out.index_copy(0, rows, self._alone(name, rows, args, kwargs).to(out.dtype))
        return out

    def _alone(self, name: str, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the layer with one adapter makes of its rows."""
        if len(args) + len(kwargs) > 1:
            raise AdapterError(
                f"a {type(self.lora_twins[name]).__name__} takes more than one argument, of which it cannot be told "
                "what belongs to which row: run the adapters one after the other"
            )
        twin = self.lora_twins[name]
        of_rows = [x.index_select(0, rows) for x in args]
        return twin.forward(*of_rows, **{key: x.index_select(0, rows) for key, x in kwargs.items()})


class RowStack:
    """``A`` and ``B`` of several adapters on one layer, looked up for each row.

    Adapters of smaller ranks are filled up with zeros.

    Args:
        layer: The plain layer.
        twins: It with each of the adapters.
        known: All adapters that rows may have.

    Attributes:
        names: Those adapters that are in the stack.
        a: ``(n, R, in)``; for an embedding ``(n, in, R)``.
        b: ``(n, R, out)``, with the scale in it.
    """

    def __init__(self, layer: nn.Module, twins: Mapping[str, nn.Module], known: Sequence[str]) -> None:
        layers: dict[str, Any] = {name: twin for name, twin in twins.items() if _is_product(layer, twin)}
        self.names = tuple(layers)
        if not layers:
            return
        some = next(iter(layers.values()))
        self._looks_up = isinstance(some, LoraOverEmbedding)
        self._factor: Tensor | None = getattr(some, "embed_scale", None) if self._looks_up else None
        rank = max(twin.lora_A.shape[0] for twin in layers.values())
        a: Tensor = some.lora_A.new_zeros(len(layers), rank, some.lora_A.shape[1])
        self.b: Tensor = some.lora_B.new_zeros(len(layers), rank, some.lora_B.shape[0])
        with torch.no_grad():
            for place, twin in enumerate(layers.values()):
                r = twin.lora_A.shape[0]
                a[place, :r] = twin.lora_A
                self.b[place, :r] = twin.lora_B.t() * twin.lora_scaling
        self.a = a.transpose(1, 2).contiguous() if self._looks_up else a
        places = [self.names.index(name) if name in self.names else 0 for name in known]
        self._places = torch.tensor(places, device=a.device)

    def delta(self, x: Tensor, numbers: Tensor) -> Tensor:
        """The updates of rows: ``(k, …, in) -> (k, …, out)``, or numbers of tokens, ``(k, …)``, to that.

        Args:
            x: The rows.
            numbers: Whose each is, ``(k,)``, counted as the adapters are known.
        """
        place = self._places[numbers]
        if self._looks_up:
            shape = x.shape
            u = self.a[place[:, None], x.reshape(len(x), -1)]  # (k, T, R)
        else:
            shape = x.shape[:-1]
            u = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), self.a[place].to(x.dtype).transpose(1, 2))
        out = torch.bmm(u, self.b[place].to(u.dtype)).view(*shape, -1)
        return out if self._factor is None else out * self._factor


def _is_product(layer: nn.Module, twin: Any) -> bool:
    """Whether an adapter's whole effect is ``s · B A`` added to the weight, beside which the base is as it was."""
    return (
        isinstance(twin, (LoraOverLinear, LoraOverEmbedding))
        and not isinstance(twin, DoraLayer)
        and twin.lora_parameter_names == ("lora_A", "lora_B")
        and type(twin).lora_delta in (LoraOverLinear.lora_delta, LoraOverEmbedding.lora_delta)
        and all(twin._parameters[name] is parameter for name, parameter in layer._parameters.items())
    )


def twin_of(layer: nn.Module) -> nn.Module:
    """A layer of the same class over the same parameters, to which others may be given; without hooks."""
    twin = copy.copy(layer)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(twin)[name] = dict(vars(layer)[name])
    for name in ("forward", "_hf_hook", "_old_forward"):
        vars(twin).pop(name, None)
    return twin


def seat(layer: nn.Module, rows: Rows, twins: Mapping[str, nn.Module], name: str = "a layer") -> None:
    """Let a plain layer, called by its name in messages, compute each row with an adapter of its own."""
    stack = RowStack(layer, twins, rows.known)
    others = {name: twin for name, twin in twins.items() if name not in stack.names}
    with detached_hook(layer):
        layer.__class__ = made_class(PerRow, type(layer))  # type: ignore[assignment]
        vars(layer).update(lora_rows=rows, lora_name=name, lora_stack=stack, lora_twins=others)


def unseat(layer: nn.Module) -> None:
    """Make it plain again."""
    with detached_hook(layer):
        layer.__class__ = plain_class(layer)  # type: ignore[assignment]
        for name in ("lora_rows", "lora_name", "lora_twins", "lora_stack"):
            del vars(layer)[name]
