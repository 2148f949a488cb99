"""Learning-rate schedules, each a function of the optimizer and the number of optimizer steps of the run.

They are those of transformers.optimization, whose import brings the whole of peft and bitsandbytes where those are
installed: a second of every program's start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03, final: float = 0.1) -> LambdaLR:
    """Rise linearly over the first part of the run, then fall along half a cosine.

    Args:
        optimizer: Whose learning rates are set.
        num_training_steps: Optimizer steps of the whole run.
        warmup: Share of the steps, in [0, 1), in which the rate rises; at least one step unless 0.
        final: Share of the full rate that is left at the end.
    """
    return _warmed(optimizer, num_training_steps, warmup, partial(_cosine, final=final))


def warmup_linear(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03) -> LambdaLR:
    """Rise linearly over the first part (``warmup``, a share of the steps) of the run, then fall linearly to 0."""
    return _warmed(optimizer, num_training_steps, warmup, _linear)


def warmup_constant(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03) -> LambdaLR:
    """Rise linearly over the first part (``warmup``, a share of the steps) of the run, then stay."""
    return _warmed(optimizer, num_training_steps, warmup, _full)


def constant(optimizer: Optimizer) -> LambdaLR:
    """Stay at the optimizer's own learning rate: the schedule for a stream without a known end."""
    return LambdaLR(optimizer, _full)


def _warmed(optimizer: Optimizer, steps: int, warmup: float, after: Callable[[float], float]) -> LambdaLR:
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    return LambdaLR(optimizer, partial(_factor, rising=rising, falling=max(1, steps - rising), after=after))


def _factor(step: int, rising: int, falling: int, after: Callable[[float], float]) -> float:
    """The share of the full rate at a step; ``after`` gives it for the share that is done of what follows warmup."""
    return step / rising if step < rising else after((step - rising) / falling)


def _cosine(done: float, final: float) -> float:
    return max(0.0, final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def _linear(done: float) -> float:
    return max(0.0, 1 - done)


def _full(done: float) -> float:
    return 1.0
