"""LoRA+: ``B`` learns faster than ``A``. Source: arXiv 2402.12354."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from lora_lightning.errors import LoraConfigError
from lora_lightning.optim.groups import parameter_groups


def lora_plus(
    model: nn.Module,
    lr: float = 1e-4,
    ratio: float = 16.0,
    lr_embedding: float = 1e-6,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> AdamW:
    """AdamW with a learning rate of ``lr · ratio`` for ``B``, and for magnitudes, biases and norms, as PEFT has it.

    Of ``A`` features move by ``lr`` times a number that shrinks as layers get wider, of ``B`` by one that does not: at
    equal rates one of the two hardly learns.

    Args:
        model: An injected model, or a LightningModule around one.
        lr: Of ``A``, and of what trains in full; about half of what suits AdamW.
        ratio: Of the two learning rates.
        lr_embedding: Of both factors of embeddings, whose ``A`` has no wide side.
        betas: Memory of the gradient and of its square.
        eps: Keeps the division by the second moment finite.
        weight_decay: Pulls towards zero; biases and norms are left out.
        fused: As of AdamW.

    Raises:
        LoraConfigError: If nothing trains, or the ratio is not positive.
    """
    if not ratio > 0:
        raise LoraConfigError(f"ratio must be a positive number (of B's learning rate to A's), got {ratio!r}")
    fast = {"lr": lr * ratio}
    groups = parameter_groups(
        model,
        B=fast,
        magnitude=fast,
        vectors={**fast, "weight_decay": 0.0},
        embeddings={"lr": lr_embedding},
    )
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)
