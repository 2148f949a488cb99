"""Learning-rate schedules, each a function of the optimizer and the number of optimizer steps of the run."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import optimization


def warmup_cosine(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03, final: float = 0.1) -> LambdaLR:
    """Rise linearly over the first part of the run, then fall along half a cosine.

    Args:
        optimizer: Whose learning rates are set.
        num_training_steps: Optimizer steps of the whole run.
        warmup: Share of the steps, in [0, 1), in which the rate rises; at least one step unless 0.
        final: Share of the full rate that is left at the end.
    """
    return optimization.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, _steps(warmup, num_training_steps), num_training_steps, min_lr_rate=final
    )


def warmup_linear(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03) -> LambdaLR:
    """Rise linearly over the first part (``warmup``, a share of the steps) of the run, then fall linearly to 0."""
    return optimization.get_linear_schedule_with_warmup(
        optimizer, _steps(warmup, num_training_steps), num_training_steps
    )


def warmup_constant(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.03) -> LambdaLR:
    """Rise linearly over the first part (``warmup``, a share of the steps) of the run, then stay."""
    return optimization.get_constant_schedule_with_warmup(optimizer, _steps(warmup, num_training_steps))


def constant(optimizer: Optimizer) -> LambdaLR:
    """Stay at the optimizer's own learning rate: the schedule for a stream without a known end."""
    return optimization.get_constant_schedule(optimizer)


def _steps(share: float, num_training_steps: int) -> int:
    return max(1, round(share * num_training_steps)) if share > 0 else 0
