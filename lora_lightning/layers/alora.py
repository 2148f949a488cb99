"""Activated LoRA: the adapter is in force from the last appearance of its invocation tokens on, and before it is not.

What was computed of a text before that point is the base's, so that a cache of it can be taken over as it is. Source:
aLoRA, arXiv 2504.12397.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer, input_of
from lora_lightning.layers.bias import BiasOverLinear
from lora_lightning.layers.invocation import Invocation
from lora_lightning.layers.linear import LoraOverLinear


class ALoraLayer(LoraLayer):
    """What layers of this variant have in common; over any forward, the update is added where it is in force.

    Attributes:
        lora_invocation: Knows where that is in the call that is under way; one for all layers of a model.
    """

    lora_invocation: Invocation
    # Those that leave the base as it is: before the tokens nothing would make up for a change.
    lora_starts: ClassVar[tuple[bool | str, ...] | None] = (True, False, "gaussian", "orthogonal", "eva")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and the update where the adapter is in force."""
        out: Tensor = super(LoraLayer, self).forward(*args, **kwargs)
        if not self.lora_enabled:
            return out
        delta = self.lora_delta(input_of(self, out, args, kwargs)).to(out.dtype)
        return out + torch.where(self.lora_invocation.mask_of(out), delta, 0)

    def lora_unmergeable(self) -> str | None:
        """No weight gives one output before the tokens and another after them."""
        return (
            "is in force from its invocation tokens on (alora_invocation_tokens), and a merged weight would be so "
            "everywhere: serve it as an adapter, with save_adapter"
        )


class ALoraOverLinear(ALoraLayer, LoraOverLinear):
    """Activated LoRA over a subclass of ``nn.Linear`` that has a forward of its own."""


class ALoraLinear(ALoraOverLinear, nn.Linear):
    """``nn.Linear`` with ``y_t = W x_t + b + [t in force] · s · B A x_t``."""


class ALoraBiasOverLinear(ALoraLayer, BiasOverLinear):
    """Activated LoRA with a bias on ``B``, over a subclass of ``nn.Linear`` that has a forward of its own."""

    lora_starts = BiasOverLinear.lora_starts


class ALoraBiasLinear(ALoraBiasOverLinear, nn.Linear):
    """Activated ``nn.Linear`` with a bias in its update."""
