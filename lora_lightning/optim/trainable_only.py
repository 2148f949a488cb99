"""Taking frozen parameters out of whatever ``configure_optimizers`` returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError


def keep_trainable(configured: Any, adapters: Mapping[str, nn.Parameter]) -> Any:
    """Take parameters that do not train out of every optimizer in a result of ``configure_optimizers``, in place.

    Groups that become empty stay, so that schedulers with one function a group stay aligned.

    Args:
        configured: What ``configure_optimizers`` returned: optimizers, schedulers, lists, tuples, dicts, or None.
        adapters: The adapter's parameters by name; each must be in some optimizer.

    Returns:
        ``configured``, the same object.

    Raises:
        LoraConfigError: If an adapter parameter is in no optimizer.
    """
    optimizers = list({id(optimizer): optimizer for optimizer in _optimizers(configured)}.values())
    for optimizer in optimizers:
        _filter(optimizer)
    if not optimizers:
        return configured
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if left_out := [name for name, parameter in adapters.items() if id(parameter) not in held]:
        more = f" and {len(left_out) - 3} more" if left_out[3:] else ""
        raise LoraConfigError(
            f"configure_optimizers leaves adapter parameters out: {', '.join(left_out[:3])}{more}. Give the optimizer "
            "self.parameters() (frozen ones are taken out by themselves), and build it in configure_optimizers, "
            "after injection"
        )
    return configured


def _optimizers(configured: Any) -> Iterator[Optimizer]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        for value in configured.values():
            yield from _optimizers(value)
    elif isinstance(configured, (list, tuple)):
        for value in configured:
            yield from _optimizers(value)


def _filter(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        keep = [p.requires_grad for p in group["params"]]
        for parameter, kept in zip(group["params"], keep, strict=True):
            if not kept:
                optimizer.state.pop(parameter, None)
        group["params"][:] = [p for p in group["params"] if p.requires_grad]
        if names := group.get("param_names"):  # kept beside the parameters by optimizers made from named ones
            names[:] = [name for name, kept in zip(names, keep, strict=True) if kept]
