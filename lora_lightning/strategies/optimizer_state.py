"""Optimizer states by the names of parameters: what moves between strategies, which number parameters differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical
from lora_lightning.injection.tensors import laid_as, spread_like

HOW_TO_STEP = ("foreach", "fused", "capturable", "differentiable")  # which belongs to a device, not to a training
_OF_GROUPS = ("lrs", "_last_lr", "lr_lambdas", "momentums")  # ends of names of what schedulers keep of every group


def named_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` gives, with canonical names of parameters in place of their numbers."""
    optimizer = _plain(optimizer)
    names = _names(optimizer, module)
    state = optimizer.state_dict()
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**settings_of(group), "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_named_states(
    optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]], module: nn.Module
) -> list[list[int]]:
    """Load what :func:`named_state` gave of each optimizer, all tensors whole, whatever order they have now.

    Returns:
        For each optimizer, which of the saved groups each of its groups is; -1 for one that was not saved.

    Raises:
        AdapterError: If there are other optimizers, groups or parameters than were saved.
    """
    if len(optimizers) != len(saved):
        raise AdapterError(f"the checkpoint has the states of {len(saved)} optimizers, this run has {len(optimizers)}")
    return [
        _load(_plain(optimizer), states, module, f"optimizer {number}")
        for number, (optimizer, states) in enumerate(zip(optimizers, saved, strict=True))
    ]


def in_order(scheduler: Any, order: Sequence[int]) -> Any:
    """A scheduler's saved state with what it has of each group in the order that the groups have now.

    Args:
        scheduler: Its ``state_dict``, or a part of it.
        order: Of its optimizer's groups, as :func:`load_named_states` gives it.
    """
    if sorted(order) != list(range(len(order))):
        return scheduler  # an engine has dropped groups in which nothing trains
    if isinstance(scheduler, Mapping):
        return {
            key: [value[number] for number in order]
            if key.endswith(_OF_GROUPS) and isinstance(value, list) and len(value) == len(order)
            else in_order(value, order)
            for key, value in scheduler.items()
        }
    return [in_order(each, order) for each in scheduler] if isinstance(scheduler, list) else scheduler


def _load(optimizer: Optimizer, saved: Mapping[str, Any], module: nn.Module, which: str) -> list[int]:
    names = _names(optimizer, module)
    here, there = set(names), {name for group in saved["param_groups"] for name in group["params"]}
    if here != there:
        differing = sorted(map(str, here ^ there))
        raise AdapterError(
            f"{which} of the checkpoint holds other parameters than this run's: {', '.join(differing[:4])}"
            + (f" and {len(differing) - 4} more" if differing[4:] else "")
        )
    pairs = _paired(optimizer.state_dict()["param_groups"], saved["param_groups"], names, which)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {key: _laid_out(value, parameters[number]) for key, value in saved["state"][name].items()}
        for number, name in enumerate(names)
        if name in saved["state"]
    }
    settings = [
        {**settings_of(there), **{key: here[key] for key in ("params", "param_names", *HOW_TO_STEP) if key in here}}
        for here, there in pairs
    ]
    optimizer.load_state_dict({"state": state, "param_groups": settings})
    places = {id(group): number for number, group in enumerate(saved["param_groups"])}
    return [places.get(id(there), -1) for _, there in pairs]


def _paired(here: list[Any], there: Sequence[Any], names: list[str], which: str) -> list[tuple[Any, Any]]:
    """Groups of this run, each with the saved one of the same parameters, since groups may have another order now.

    Groups without parameters are told apart by their order alone. Some engines drop them: where there are not as many
    as were saved, each keeps what it has.
    """
    empty = [group for group in there if not group["params"]]
    if len(empty) != sum(not group["params"] for group in here):
        empty = [group for group in here if not group["params"]]
    unused = iter(empty)
    saved = {frozenset(group["params"]): group for group in there if group["params"]}
    pairs = []
    for group in here:
        members = [names[number] for number in group["params"]]
        if members and frozenset(members) not in saved:
            raise AdapterError(
                f"{which} of the checkpoint has {len(there)} parameter groups, this run's has {len(here)}, and no "
                f"group of the checkpoint has the parameters of this run's with {', '.join(members[:4])}"
                + (f" and {len(members) - 4} more" if members[4:] else "")
                + ": group them as they were, since each group has a learning rate of its own"
            )
        pairs.append((group, saved[frozenset(members)] if members else next(unused)))
    return pairs


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A saved value beside its parameter: what has the parameter's shape lies in memory, and over processes, as it."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
        return laid_as(spread_like(value, parameter), parameter)
    return value


def _names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    known = {id(p): canonical(name) for name, p in module.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    # A parameter that belongs to no module of the LightningModule has its place for a name.
    return [known.get(id(p), f"[{number}]") for number, p in enumerate(held)]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group says beside its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _plain(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
