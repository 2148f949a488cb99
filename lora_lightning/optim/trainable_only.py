"""Taking frozen parameters out of whatever ``configure_optimizers`` returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError


def keep_trainable(
    configured: Any, adapters: Mapping[str, nn.Parameter], beside: Mapping[str, Tensor] | None = None
) -> Any:
    """Take parameters that do not train out of every optimizer in a result of ``configure_optimizers``, in place.

    Groups that become empty stay, so that schedulers with one function a group stay aligned. An adapter parameter
    that no optimizer has joins the group that its layer's weight is in: LightningCLI makes optimizers before there
    are adapters.

    Args:
        configured: What ``configure_optimizers`` returned: optimizers, schedulers, lists, tuples, dicts, or None.
        adapters: The adapter's parameters by name; each must be in some optimizer.
        beside: The base weight that an adapter parameter belongs to, by the adapter parameter's name.

    Returns:
        ``configured``, the same object.

    Raises:
        LoraConfigError: If an adapter parameter is in no optimizer, nor its layer's weight.
    """
    optimizers = list({id(optimizer): optimizer for optimizer in optimizers_in(configured)}.values())
    if not optimizers:
        return configured
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in adapters.items():
        home = group_of.get(id((beside or {}).get(name)))
        if id(parameter) not in group_of and home is not None:
            home["params"].append(parameter)
            if "param_names" in home:
                home["param_names"].append(name)
    for optimizer in optimizers:
        _filter(optimizer)
    held = {id(p) for group in groups for p in group["params"]}
    if left_out := [name for name, parameter in adapters.items() if id(parameter) not in held]:
        more = f" and {len(left_out) - 3} more" if left_out[3:] else ""
        raise LoraConfigError(
            f"configure_optimizers leaves adapter parameters out: {', '.join(left_out[:3])}{more}. Give the optimizer "
            "self.parameters() (frozen ones are taken out by themselves), and build it in configure_optimizers, "
            "after injection"
        )
    return configured


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Every optimizer in a result of ``configure_optimizers``."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        for value in configured.values():
            yield from optimizers_in(value)
    elif isinstance(configured, (list, tuple)):
        for value in configured:
            yield from optimizers_in(value)


def _filter(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        keep = [p.requires_grad for p in group["params"]]
        for parameter, kept in zip(group["params"], keep, strict=True):
            if not kept:
                optimizer.state.pop(parameter, None)
        group["params"][:] = [p for p in group["params"] if p.requires_grad]
        if names := group.get("param_names"):  # kept beside the parameters by optimizers made from named ones
            names[:] = [name for name, kept in zip(names, keep, strict=True) if kept]
