"""Where the kernels written for CUDA are of use."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """:mod:`lora_lightning.layers.kernels` where a tensor can be given to them, else None."""
    return _kernels() if x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling() else None


@cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from lora_lightning.layers import kernels

    return kernels
