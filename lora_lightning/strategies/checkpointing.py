"""Activation checkpointing that adapters can be trained under: the kind that is not re-entrant."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import canonical
from lora_lightning.strategies.blocks import blocks


def checkpoint_activations(model: nn.Module) -> None:
    """Have each repeated block computed again in backward instead of keeping its activations, in place.

    A transformers model is asked to do so itself; elsewhere torch's wrapper goes around the blocks (it does not count
    in names).
    """
    for module in model.modules():
        for method in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # newer name, older name
            if getattr(module, "supports_gradient_checkpointing", False) and callable(f := getattr(module, method, 0)):
                f({"use_reentrant": False})
                return
    wanted = {id(block) for block in blocks(model)}
    if not wanted:
        raise LoraConfigError("no activations to checkpoint: the model has no nn.ModuleList of several equal blocks")
    for parent in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for name, child in parent.named_children():
            if id(child) in wanted:
                parent._modules[name] = checkpoint_wrapper(child, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def refuse_reentrant(model: nn.Module) -> None:
    """Refuse re-entrant activation checkpointing, under which adapters behind frozen embeddings get no gradient.

    Raises:
        LoraConfigError: If a module checkpoints in that way and nothing makes its inputs require gradients.
    """
    asks_inputs = any(hasattr(module, "_require_grads_hook") for module in model.modules())
    for name, module in model.named_modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        on = getattr(module, "gradient_checkpointing", False)
        settings = getattr(function, "keywords", {})
        wrapped = isinstance(module, CheckpointWrapper) and module.checkpoint_impl is CheckpointImpl.REENTRANT
        if wrapped or (on and not asks_inputs and settings.get("use_reentrant", False)):
            raise LoraConfigError(
                f"{canonical(name) or type(module).__name__} uses re-entrant activation checkpointing, which computes "
                "no gradient for adapters where a block's input needs none (frozen embeddings): use "
                "gradient_checkpointing_enable({'use_reentrant': False}), or CheckpointImpl.NO_REENTRANT"
            )
