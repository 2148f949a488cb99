"""Models that are all one model: modules of their own over the same memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shell_of(base: nn.Module) -> nn.Module:
    """A model of its own over the memory of another: it can be adapted, frozen and let go without the other noticing.

    Parameters are objects of their own over the same memory, so that each model freezes its own, and one that is moved
    to another device moves alone; buffers are the same tensors. Whoever writes into a frozen weight (merging does)
    writes into all shells' weights.

    Args:
        base: A model without adapters.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in base.buffers()}
    for parameter in base.parameters():
        plain = type(parameter) is nn.Parameter  # others (quantised ones) bring a state of their own
        own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad) if plain else parameter
        memo[id(parameter)] = own
    return copy.deepcopy(base, memo)
