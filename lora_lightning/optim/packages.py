"""Optimizers out of packages that need not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError


def schedule_free(
    params: Iterable[Any],
    lr: float = 2.5e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Optimizer:
    """AdamW that averages what it has learnt in place of a falling learning rate. Source: arXiv 2405.15682.

    The package's own class. It trains on one point and is judged at another, the average: `LoraCallback` sees to it
    that validations, checkpoints and the finished adapter are of the average.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; it wants no schedule but warming up.
        betas: How far the trained point lies towards the average, and memory of the squared gradient.
        eps: Keeps the division by the second moment finite.
        weight_decay: Pulls towards zero.
        warmup_steps: Steps in which the rate rises.
        r: Power of the step's number in the weights of the average.
        weight_lr_power: Power of the learning rate in them.

    Raises:
        LoraConfigError: If the package is not installed.
    """
    package = _package("schedulefree", "optimizer=schedule_free")
    return package.AdamWScheduleFree(
        params,
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
    )


def adamw_8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    paged: bool = False,
) -> Optimizer:
    """AdamW of bitsandbytes, whose moments take a byte a number; those of tensors below 4096 numbers take four.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Memory of the gradient and of its square.
        eps: Keeps the division by the second moment finite.
        weight_decay: Pulls towards zero.
        paged: Let moments move to main memory where the device's is short.

    Raises:
        LoraConfigError: If the package is not installed, or parameters are spread over processes, which it cannot step.
    """
    params = list(params)
    if any(isinstance(p, DTensor) for each in params for p in (each["params"] if isinstance(each, dict) else [each])):
        raise LoraConfigError(
            "bitsandbytes cannot step parameters that FSDP2 or tensor parallel spreads over processes: take "
            "optimizer=adamw, or strategy='ddp' or 'fsdp', which leave adapters whole"
        )
    package = _package("bitsandbytes", "optimizer=adamw_8bit")
    kind = package.optim.PagedAdamW8bit if paged else package.optim.AdamW8bit
    return kind(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)


def _package(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoraConfigError(f"{what} needs the package {name} ({error}): pip install {name}") from error
