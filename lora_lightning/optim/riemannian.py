"""Riemannian preconditioning: each factor's gradient is scaled by the other factor. Source: arXiv 2402.02347."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.tensors import whole
from lora_lightning.optim.corrected import corrected, inverses, set_gradient
from lora_lightning.optim.groups import Pair, pairs_that_train, parameter_groups

_O = TypeVar("_O", bound=Optimizer)


def riemannian(
    model: nn.Module,
    lr: float = 1e-3,
    reg: float = 1e-2,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> AdamW:
    """AdamW on ``dA ← (Bᵀ B + δI)⁻¹ dA`` and ``dB ← dB (A Aᵀ + δI)⁻¹``.

    What is learnt then hardly depends on how large ``A`` and ``B`` are beside each other, and with it on the learning
    rate and the start. What else trains is stepped on as ever.

    Args:
        model: An injected model, or a LightningModule around one.
        lr: Learning rate.
        reg: The damping ``δ``, positive; ``B`` begins at zero.
        betas: Memory of the gradient and of its square.
        eps: Keeps the division by the second moment finite.
        weight_decay: Pulls towards zero.
        fused: As of AdamW.

    Raises:
        LoraConfigError: If there is no adapter, none of its pairs trains both factors, or ``reg`` is not positive.
    """
    settings = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay, "fused": fused}
    return precondition(model, AdamW(parameter_groups(model), **settings), reg)  # type: ignore[arg-type]


def riemannian_sgd(
    model: nn.Module,
    lr: float = 1e-1,
    reg: float = 1e-2,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> SGD:
    """SGD on the gradients of :func:`riemannian`: the paper's scaled gradient descent.

    Args:
        model: As of :func:`riemannian`.
        lr: Learning rate; the first steps of ``A`` are ``1/reg`` times as long as without preconditioning.
        reg: The damping ``δ``.
        momentum: Memory of the gradient.
        weight_decay: Pulls towards zero.
        fused: As of SGD.

    Raises:
        LoraConfigError: As :func:`riemannian`.
    """
    optimizer = SGD(parameter_groups(model), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
    return precondition(model, optimizer, reg)


def precondition(model: nn.Module, optimizer: _O, reg: float = 1e-2) -> _O:
    """Have any optimizer over a model's adapter step on preconditioned gradients.

    Args:
        model: An injected model, or a LightningModule around one.
        optimizer: It has to hold the factors that train; LBFGS, which compares gradients of several points, is not for
            this.
        reg: The damping ``δ``.

    Returns:
        The optimizer.

    Raises:
        LoraConfigError: As :func:`riemannian`.
    """
    if not reg > 0:
        raise LoraConfigError(f"reg must be positive (it keeps Bᵀ B invertible while B is zero), got {reg!r}")
    trained = pairs_that_train(model)
    return corrected(optimizer, _Preconditioner(trained, reg), [p for pair in trained for p in (pair.a, pair.b)])


class _Preconditioner:
    def __init__(self, trained: Sequence[Pair], reg: float) -> None:
        self._pairs, self._reg = trained, reg

    def __call__(self) -> None:
        pairs = [pair for pair in self._pairs if pair.a.grad is not None and pair.b.grad is not None]
        as_ = [pair.a_matrices(whole(pair.a.detach())) for pair in pairs]
        bs = [pair.b_matrices(whole(pair.b.detach())) for pair in pairs]
        beside_a = inverses([b.mT @ b for b in bs], self._reg)
        beside_b = inverses([a @ a.mT for a in as_], self._reg)
        for pair, left, right in zip(pairs, beside_a, beside_b, strict=True):
            da, db = (whole(gradient) for gradient in (pair.a.grad, pair.b.grad) if gradient is not None)
            set_gradient(pair.a, left @ pair.a_matrices(da))
            set_gradient(pair.b, pair.as_b(pair.b_matrices(db) @ right))
