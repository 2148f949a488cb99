"""Other values under the names of a module's tensors, for a forward that reads them past the layers' own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from threading import RLock

from torch import Tensor, nn

Shown = tuple[nn.Module, str, Tensor]
"""A module, a name, and the value that is to be read there."""

_ONE_AT_A_TIME = RLock()  # two threads in one module's forward would take each other's values away


@contextlib.contextmanager
def showing(values: Iterable[Shown]) -> Iterator[None]:
    """Inside the ``with`` block, modules show other tensors under the names of their own.

    A parameter stays registered, and with it names, hooks and ties: the instance's attribute only comes before it.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with showing([(layer, "weight", torch.full((1, 1), 3.0))]):
    ...     layer(torch.ones(1))
    tensor([3.])
    >>> "weight" in vars(layer)
    False
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as undo:
        for module, name, value in values:
            own = vars(module)
            undo.callback(own.__setitem__ if name in own else own.pop, name, own.get(name))
            own[name] = value
        yield
