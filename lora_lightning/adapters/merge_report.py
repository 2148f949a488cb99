"""What merging has done to a model: how far its weights moved, what rounding took, and what came out for a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the base that an adapter was folded into.

    Attributes:
        name: Its canonical name.
        change: ``‖W' − W‖ / ‖W‖``, before rounding.
        rounding: What rounding to the tensor's dtype has taken of the change, ``‖round(W') − W'‖ / ‖W' − W‖``: 0 where
            nothing was rounded, about 1 where the update was smaller than the steps of the dtype.
    """

    name: str
    change: float
    rounding: float


@dataclass(frozen=True)
class MergeReport:
    """What :func:`lora_lightning.merge_lora` gives back; prints as one line.

    Attributes:
        tensors: One for each tensor that was changed.
        difference: The largest absolute difference of the model's outputs before and after, if it was asked for.
        untied: Names of the weights that got a tensor of their own.
    """

    tensors: tuple[MergedTensor, ...]
    difference: float | None = None
    untied: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report in one line."""
        if not self.tensors:
            return "no weight was changed: what the adapter trained it trained in full"
        moved = max(self.tensors, key=lambda tensor: tensor.change)
        told = [f"{len(self.tensors)} weights merged, moved by up to {moved.change:.2g} of their size ({moved.name})"]
        lost = max(self.tensors, key=lambda tensor: tensor.rounding)
        if lost.rounding > 1e-6:
            told.append(f"rounding has taken up to {lost.rounding:.2%} of an update ({lost.name})")
        if self.untied:
            told.append(f"untied: {', '.join(self.untied)}")
        if self.difference is not None:
            told.append(f"outputs differ by at most {self.difference:.2g}")
        return "; ".join(told)


def warn_of_bits(tensors: Sequence[MergedTensor]) -> None:
    """Tell what quantising merged weights again has taken, the largest error by name."""
    if not tensors:
        return
    worst = max(tensors, key=lambda tensor: tensor.change * tensor.rounding)
    warnings.warn(
        f"merged into a quantised base: quantising {len(tensors)} weights again has moved them by up to "
        f"{worst.change * worst.rounding:.2%} of their size ({worst.name}, which the adapter moves by "
        f"{worst.change:.2%}). Where that is too much, keep the adapter beside the base, or merge it into the base "
        "that is not quantised",
        stacklevel=4,
    )


@torch.no_grad()
def outputs_of(model: nn.Module, batch: Any) -> Tensor:
    """A model's logits (or whatever tensor it gives first) for a batch, in eval mode; modes are put back.

    Args:
        model: The model.
        batch: Its one argument, a tensor; or a tuple of arguments, or a mapping of them by name.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if isinstance(batch, Mapping):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for module in training:
            module.training = True
    found = getattr(out, "logits", None)
    if found is None and not isinstance(out, Tensor):
        found = next((value for value in (out.values() if isinstance(out, Mapping) else out)), None)
    found = out if found is None else found
    if not isinstance(found, Tensor):
        raise AdapterError(f"check_on needs a model that gives a tensor or logits, this one gave {type(out).__name__}")
    return found.detach()


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors, in float32 at least."""
    dtype = torch.promote_types(one.dtype, torch.float32)
    return float((one.to(dtype) - other.to(dtype)).abs().max())
