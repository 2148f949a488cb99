"""How many bytes of tensors are alive while something runs, counted one tensor by one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, each storage once, for as long as somebody holds it.

    Attributes:
        now: Bytes that are alive.
        most: The most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        held = weakref.ref(storage, self._gone)
        if held not in self._sizes:
            self._sizes[held] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _gone(self, held: weakref.ref[Any]) -> None:
        self.now -= self._sizes.pop(held, 0)
