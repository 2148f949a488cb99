"""The optimizer of DeepSpeed's ZeRO by the names of parameters: it keeps flat float32 parts of them, without names.

Values go in and out through DeepSpeed's public functions, one parameter at a time. They leave three things open, for
which attributes of its optimizer are read: which parameters a flat tensor is made of, the numbers that belong to all of
it (Adam's ``step``), and making the state before the first step would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.strategies.optimizer_state import HOW_TO_STEP, settings_of

_LOSS_SCALER = "loss_scaler"


def master(parameter: nn.Parameter) -> Tensor | None:
    """The whole float32 value that the optimizer steps on, on every process; None outside training."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter) if _is_stepped(parameter) else None


def set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the value that the optimizer steps on; the parameter itself is to be set too."""
    from deepspeed.utils import safe_set_full_fp32_param

    if _is_stepped(parameter):
        safe_set_full_fp32_param(parameter, value)


def named_state(zero: Any, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What the wrapped optimizer would have as its state without ZeRO, by names; on every process.

    Args:
        zero: DeepSpeed's optimizer.
        named: The parameters that train, by canonical name.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

    names = {id(p): name for name, p in named.items()}
    groups: list[list[str]] = [[] for _ in zero.param_groups]
    state: dict[str, dict[str, Any]] = {}
    for number, parameters, flat in _flats(zero):
        if flat in zero.state and not _is_stage_3(zero):
            # DeepSpeed does so after the first group's first step, when the other groups have no state yet.
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.state)
        for parameter in parameters:
            name = names[id(parameter)]
            groups[number].append(name)
            if flat in zero.state:
                state[name] = {
                    key: safe_get_full_optimizer_state(parameter, key).cpu()
                    if _is_spread(value, flat)
                    else _copy(value)
                    for key, value in zero.state[flat].items()
                }
    settings = [{**settings_of(g), "params": part} for g, part in zip(zero.param_groups, groups, strict=True)]
    return {"state": state, "param_groups": settings, _LOSS_SCALER: _numbers(zero.loss_scaler)}


@torch.no_grad()
def scale_gradients(zero: Any, factor: Tensor | float) -> None:
    """Multiply the averaged gradients, each process its part; after the last batch of those that are accumulated."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    if _is_stage_3(zero):
        for parameter in (p for group in zero.fp16_groups for p in group):
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)
    elif zero.cpu_offload:
        for flat in zero.single_partition_of_fp32_groups:
            flat.grad.mul_(factor)
    else:
        for gradient in (g for several in zero.averaged_gradients.values() for g in several or ()):
            gradient.mul_(factor)


@torch.no_grad()
def load_named_state(zero: Any, saved: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
    """Put back what :func:`named_state` gave, or an optimizer's state by names from another strategy.

    Raises:
        AdapterError: If there are other groups or parameters than were saved.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    names = {id(p): name for name, p in named.items()}
    flats = list(_flats(zero))
    # DeepSpeed drops groups in which nothing trains, other strategies keep them.
    groups = [(n, g) for n, g in enumerate(zero.param_groups) if any(n == number for number, *_ in flats)]
    before = [group for group in saved["param_groups"] if group["params"]]
    here = [{names[id(p)] for number, several, _ in flats if number == n for p in several} for n, _ in groups]
    there = [set(group["params"]) for group in before]
    if here != there:
        differing = sorted(set().union(*here) ^ set().union(*there)) or ["the same ones in other groups"]
        raise AdapterError(
            f"the checkpoint's optimizer holds other parameters than this run's ({len(there)} groups, {len(here)} "
            f"here): {', '.join(differing[:4])}" + (f" and {len(differing) - 4} more" if differing[4:] else "")
        )
    for number, parameters, flat in flats:
        values = {names[id(p)]: saved["state"].get(names[id(p)]) for p in parameters}
        given = [value for value in values.values() if value]
        if not given:
            continue
        if len(given) < len(values):
            missing = next(name for name, value in values.items() if not value)
            raise AdapterError(f"the checkpoint has no optimizer state of {missing}, and ZeRO steps it with others")
        first = parameters[0]
        shapes = {key: isinstance(value, Tensor) and value.shape == _shape(first) for key, value in given[0].items()}
        zero.state[flat] = {
            key: torch.zeros_like(flat) if spread else _beside(given[0][key], flat, zero.param_groups[number])
            for key, spread in shapes.items()
        }
        if not _is_stage_3(zero):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.state)
        for parameter in parameters:
            for key in (key for key, spread in shapes.items() if spread):
                safe_set_full_optimizer_state(parameter, values[names[id(parameter)]][key].to(flat.device), key)
    for (_, group), settings in zip(groups, before, strict=True):
        group.update({key: value for key, value in settings_of(settings).items() if key not in HOW_TO_STEP})
    vars(zero.loss_scaler).update(saved.get(_LOSS_SCALER, {}))


def _flats(zero: Any) -> Iterator[tuple[int, list[nn.Parameter], Tensor]]:
    """Group number, parameters and flat float32 part of every tensor that the wrapped optimizer steps on."""
    if _is_stage_3(zero):
        several = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        for number, (parameters, flat) in enumerate(several):
            yield zero.sub_group_to_group_id[number], parameters, flat
    else:
        several = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        for number, (parameters, flat) in enumerate(several):
            if parameters:
                yield number, parameters, flat


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _is_stepped(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_z3_optimizer" if hasattr(parameter, "ds_id") else "_hp_mapping")


def _is_spread(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _beside(value: Any, flat: Tensor, group: Mapping[str, Any]) -> Any:
    """A step count where the optimizer looks for it: on the CPU, unless it steps without asking the CPU."""
    on_device = isinstance(value, Tensor) and (group.get("fused") or group.get("capturable"))
    return value.to(flat.device, copy=True) if on_device else _copy(value)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _numbers(loss_scaler: Any) -> dict[str, Any]:
    """What a loss scaler has come to, in plain numbers."""
    return {key: value for key, value in vars(loss_scaler).items() if isinstance(value, (bool, int, float))}
