"""Optimizers of many small tensors in one kernel: ``fused=True`` where nobody has said how they are to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lora_lightning.injection.tensors import laid_as
from lora_lightning.optim.trainable_only import optimizers_in

_CLASSES = (Adam, AdamW, SGD)  # these alone: a subclass may step in its own way
_DEVICES = ("cpu", "cuda")
_MARK = "_lora_fused"


def fuse(configured: Any, module: nn.Module) -> Any:
    """Let optimizers step by torch's fused kernels, which give the same values but for rounding.

    An adapter is hundreds of small tensors; the default takes a kernel (on the CPU a Python loop) for each operation
    on each. A group is left alone where ``fused`` or ``foreach`` was given, where it asks for ``capturable``,
    ``differentiable`` or a learning rate in a tensor, and where its parameters are not plain floating-point ones on a
    CPU or GPU (those of FSDP, FSDP2, tensor parallel and DeepSpeed are not). What is decided is decided before each
    step, so that groups added or loaded meanwhile are looked at too.

    Nothing else sees it: ``state_dict`` says what it would say without, so a checkpoint goes on wherever an unfused one
    would, and ``torch.amp.GradScaler`` unscales by itself as ever, so gradients can be clipped and looked at.

    Args:
        configured: What ``configure_optimizers`` returned.
        module: What is trained: where an embedding in it makes sparse gradients, nothing is changed.

    Returns:
        ``configured``, the same object.
    """
    if any(getattr(part, "sparse", False) is True for part in module.modules()):
        return configured
    for optimizer in optimizers_in(configured):
        untold = all(group.get("fused") is None and group.get("foreach") is None for group in optimizer.param_groups)
        if type(optimizer) in _CLASSES and untold and _MARK not in vars(optimizer):
            vars(optimizer)[_MARK] = True
            optimizer.register_step_pre_hook(_switch_on)
            optimizer.register_state_dict_post_hook(_unsaid)
    return configured


def lay_alike(optimizer: Optimizer) -> None:
    """Before a step, bring gradients and states into the order of memory of their parameters.

    torch's fused kernel for the CPU goes through the memory of all of them in step, whatever the strides say: where
    these differ it steps wrongly, without a word. They may differ where parameters became views of other memory after
    their optimizer was made, or after it was loaded; views of other memory are what is looked at here.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.is_contiguous():
                continue
            if parameter.grad is not None:
                parameter.grad = laid_as(parameter.grad, parameter)
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = laid_as(value, parameter)


def _switch_on(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused") is None and _fits(group):
            # Not `_step_supports_amp_scaling` beside it, as the constructor sets: then a loss scaler would leave
            # unscaling to the kernel, and whoever looks at gradients before the step would see scaled ones.
            group["fused"] = True
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if isinstance(step := state.get("step"), Tensor):  # the kernel counts where the parameter is
                    state["step"] = step.to(parameter.device, torch.float32)


def _fits(group: dict[str, Any]) -> bool:
    if group.get("foreach") is not None or group.get("capturable") or group.get("differentiable"):
        return False
    parameters = group["params"]
    return (
        bool(parameters)
        and not isinstance(group["lr"], Tensor)
        and parameters[0].device.type in _DEVICES
        and all(
            type(p) is nn.Parameter
            and p.device.type == parameters[0].device.type
            and p.layout is torch.strided
            and p.is_floating_point()
            and p.numel()
            for p in parameters
        )
    )


def _unsaid(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What was not said is not saved either, and counts of steps lie where an unfused optimizer has them."""
    ours = {key for group in state_dict["param_groups"] if group.get("fused") for key in group["params"]}
    return {
        **state_dict,
        "param_groups": [{**group, "fused": None} for group in state_dict["param_groups"]],
        "state": {key: _on_cpu(state) if key in ours else state for key, state in state_dict["state"].items()},
    }


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "step": state["step"].cpu()} if isinstance(state.get("step"), Tensor) else state
