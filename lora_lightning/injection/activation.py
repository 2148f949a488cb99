"""An activated adapter's one :class:`Invocation`: on the model's calls, and known to its layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import canonical_modules
from lora_lightning.layers.alora import ALoraLayer
from lora_lightning.layers.invocation import Invocation

_INVOCATION = "lora_invocation"


def activate(root: nn.Module, tokens: Sequence[int]) -> None:
    """Have a root's activated layers know where they are in force; layers added since the last time too."""
    invocation = next((found for module in root.modules() if (found := _held(module)) is not None), None)
    if invocation is None:
        invocation = Invocation(tokens)
        for _, module in canonical_modules(root):
            kind: type = type(module)
            if module is root or _takes_tokens(kind):  # a backbone may be called without its head
                module.register_forward_pre_hook(invocation.before, with_kwargs=True)
                module.register_forward_hook(invocation.after, with_kwargs=True, always_call=True)
    for _, layer in canonical_modules(root):
        if isinstance(layer, ALoraLayer):
            vars(layer)[_INVOCATION] = invocation


def check_activation(root: nn.Module, tokens: Sequence[int] | None) -> None:
    """See that one list of token numbers says where every layer is.

    Raises:
        LoraConfigError: If the model is an encoder-decoder, whose halves have texts of their own.
    """
    if tokens and getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise LoraConfigError(
            f"alora_invocation_tokens is for decoders, and {type(root).__name__} is an encoder-decoder: nothing tells "
            "its layers which of the two texts they work on"
        )


def deactivate(root: nn.Module) -> None:
    """Take every trace of it off again."""
    for module in root.modules():
        vars(module).pop(_INVOCATION, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Invocation)]:
                del hooks[number]
                for told in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    told.pop(number, None)


def _held(module: nn.Module) -> Invocation | None:
    return vars(module).get(_INVOCATION)


@functools.cache
def _takes_tokens(kind: type) -> bool:
    forward: Any = getattr(kind, "forward", None)
    try:
        return "input_ids" in inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return False
