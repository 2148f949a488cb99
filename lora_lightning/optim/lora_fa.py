"""LoRA-FA: ``A`` stays as it began, and ``B``'s gradient makes up for it. Source: arXiv 2308.03303."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import AdamW

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.tensors import whole
from lora_lightning.optim.corrected import corrected, inverses, set_gradient
from lora_lightning.optim.groups import Pair, pairs, parameter_groups

_DAMPING = 1e-8


def lora_fa(
    model: nn.Module,
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> AdamW:
    """AdamW over everything but ``A``, on ``dB ← dB (A Aᵀ)⁻¹ / s²``.

    With that gradient, ``s · dB A`` is the step of the weight nearest to its full gradient that ``A`` allows. ``A`` is
    frozen here, so that layers keep only ``x Aᵀ`` for backward, not their input. Embeddings, whose ``A`` starts at
    zero, train both factors as ever.

    Args:
        model: An injected model, or a LightningModule around one.
        lr: Learning rate.
        betas: Memory of the gradient and of its square.
        eps: Keeps the division by the second moment finite.
        weight_decay: Pulls ``B`` towards zero, and so the model towards its base.
        fused: As of AdamW.

    Raises:
        LoraConfigError: If there is no adapter, or none of its ``B`` trains.
    """
    frozen = [pair for pair in pairs(model).values() if not pair.is_embedding]
    if frozen and not any(pair.b.requires_grad for pair in frozen):
        raise LoraConfigError(
            f"lora_fa trains B and freezes A, and every B of this {type(model).__name__} is frozen already: "
            "init_lora_weights='mica' trains A alone, and finetuning callbacks freeze what is to train later. Take "
            "optimizer=adamw or lora_plus, or a start that trains B"
        )
    for pair in frozen:
        pair.a.requires_grad_(False)
        pair.a.grad = None
    settings = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay, "fused": fused}
    optimizer = AdamW(parameter_groups(model), **settings)  # type: ignore[arg-type]
    felt = [pair for pair in frozen if pair.scaling]  # at a scale of zero dB is zero, and 1 / s² infinite
    return corrected(optimizer, _Projection(felt), [pair.b for pair in felt if pair.b.requires_grad])


class _Projection:
    """``dB ← dB (A Aᵀ + δI)⁻¹ / s²`` for every pair; the inverses are made anew where an ``A`` has been written to."""

    def __init__(self, frozen: Sequence[Pair]) -> None:
        self._pairs = frozen
        self._inverses: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    def __call__(self) -> None:
        versions = [(pair.a.data_ptr(), pair.a._version) for pair in self._pairs]
        if versions != self._versions:
            factors = [pair.a_matrices(whole(pair.a.detach())) for pair in self._pairs]
            self._inverses = inverses([a @ a.mT for a in factors], _DAMPING)
            self._versions = versions
        for pair, inverse in zip(self._pairs, self._inverses, strict=True):
            if pair.b.grad is not None:
                gradient = pair.b_matrices(whole(pair.b.grad)) @ inverse
                set_gradient(pair.b, pair.as_b(gradient / pair.scaling**2))
