"""Other values under the names of a module's tensors, for a forward that reads them past the layers' own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

Shown = tuple[nn.Module, str, Tensor]
"""A module, a name, and the value that is to be read there."""

_ONE_AT_A_TIME = RLock()  # two threads in one module's forward would take each other's values away


@contextlib.contextmanager
def showing(values: Iterable[Shown]) -> Iterator[None]:
    """Inside the ``with`` block, modules show other tensors under the names of their own.

    A parameter stays registered, and with it names, hooks and ties: the instance's attribute only comes before it.

    Args:
        values: Best a generator: what it reads of the modules to make its values is then what they have, and not what
            another thread shows in them.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with showing([(layer, "weight", torch.full((1, 1), 3.0))]):
    ...     layer(torch.ones(1))
    tensor([3.])
    >>> "weight" in vars(layer)
    False
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _ONE_AT_A_TIME:
        try:
            for module, name, value in values:
                own = vars(module)
                before.append((own, name, own.pop(name, None)))
                own[name] = value
            yield
        finally:
            for own, name, was in reversed(before):
                del own[name]
                if was is not None:
                    own[name] = was
