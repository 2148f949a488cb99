"""Values that autograd computes again in backward where it would keep them: weights with their updates in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Recomputed:
    """How to make a value again of which autograd wants to keep the whole, or views into it.

    Args:
        value: The value; it is not held on to.
        make: Makes it, always from the same tensors.
        sources: Tensors it is made from, which must not change until backward.
    """

    def __init__(self, value: Tensor, make: Callable[[], Tensor], sources: Sequence[Tensor]) -> None:
        """Remember where the value lies while it is there."""
        self._address = value.untyped_storage().data_ptr()
        self._make, self._sources = make, list(sources)
        self._versions = [source._version for source in sources]
        self._awaited = 0
        self._again: Tensor | None = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is the value, or a view into it."""
        return type(tensor) is Tensor and tensor.untyped_storage().data_ptr() == self._address

    def pack(self, tensor: Tensor) -> tuple[Recomputed, Any, Any, Any]:
        """What to keep in place of the value, or of a view into it."""
        self._awaited += 1
        return self, tensor.shape, tensor.stride(), tensor.storage_offset()

    @torch.no_grad()
    def view(self, shape: Any, stride: Any, offset: Any) -> Tensor:
        """The view that was packed, into a value that stays from the first such call to the last.

        Raises:
            RuntimeError: If a tensor that the value is made from has changed since.
        """
        if [source._version for source in self._sources] != self._versions:
            raise RuntimeError("an adapter was changed between forward and backward, and gradients would be wrong")
        if self._again is None:
            self._again = self._make()
        found = self._again.as_strided(shape, stride, offset)
        self._awaited -= 1
        if self._awaited <= 0:
            self._again = None
        return found


@contextlib.contextmanager
def recomputing(recipes: Sequence[Recomputed]) -> Iterator[None]:
    """Inside the ``with`` block autograd keeps recipes in place of values.

    Where something else has a say in what autograd keeps (activation checkpointing, offloading), it has it alone.
    """
    if not recipes or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _somebody_else():
        yield
        return

    def pack(tensor: Tensor) -> Any:
        return next((recipe.pack(tensor) for recipe in recipes if recipe.is_of(tensor)), tensor)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].view(*kept[1:])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _somebody_else() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
