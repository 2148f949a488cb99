"""Steps of optimizers that hold plain parameters and ``DTensor`` side by side."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lora_lightning.injection.tensors import same_kind

_MARK = "_lora_by_kind"


def step_by_kind(optimizer: Optimizer) -> None:
    """Let every group of an optimizer be split by the kind of its parameters while it steps.

    Fused and foreach steps refuse plain tensors beside ``DTensor``, as a plan that covers only some layers leaves them.
    Before and after a step the groups are as they were, so that schedulers and checkpoints see nothing of it.
    """
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    if _MARK not in vars(optimizer) and any(len(same_kind(g["params"])) > 1 for g in optimizer.param_groups):
        vars(optimizer)[_MARK] = True
        optimizer.register_step_pre_hook(_split)
        optimizer.register_step_post_hook(join_groups)


def _split(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    vars(optimizer)["_lora_groups"] = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "params": [group["params"][i] for i in positions]}
        for group in optimizer.param_groups
        for positions in (same_kind(group["params"]) or {None: []}).values()
    ]


def join_groups(optimizer: Optimizer, *_: Any) -> None:
    """Bring the groups back that were split; needed too where a step ends by an exception."""
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    groups = vars(optimizer).pop("_lora_groups", None)
    if groups is None:
        return
    parts = iter(optimizer.param_groups)
    for group in groups:
        several = [next(parts) for _ in same_kind(group["params"]) or (None,)]
        # Some optimizers keep numbers of their own in a group.
        group.update({key: value for key, value in several[-1].items() if key != "params"})
    optimizer.param_groups = groups
