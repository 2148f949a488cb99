"""LoRA-RITE: an adaptive step of ``B A`` that does not depend on how ``B`` and ``A`` share it.

Source: arXiv 2410.20625, algorithm 1, with means over rows and moments that forget, as in its authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_lightning.injection.tensors import local, spread_like, whole
from lora_lightning.optim.corrected import corrected
from lora_lightning.optim.groups import Pair, pairs_that_train, parameter_groups


def lora_rite(
    model: nn.Module,
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> AdamW:
    """AdamW whose low-rank factors step by LoRA-RITE; what else trains steps as ever.

    Args:
        model: An injected model, or a LightningModule around one.
        lr: Learning rate.
        betas: Memory of the step and of the gradient's second moment.
        eps: Keeps the division by the root of the second moment finite.
        weight_decay: Pulls towards zero.
        fused: As of AdamW, for what else trains.

    Raises:
        LoraConfigError: If there is no adapter, or none of its pairs trains both factors.
    """
    settings = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay, "fused": fused}
    optimizer = AdamW(parameter_groups(model), **settings)  # type: ignore[arg-type]
    # Set by `fused`: a loss scaler would leave unscaling to the kernel, which is to step on no pair.
    vars(optimizer)["_step_supports_amp_scaling"] = False
    trained = pairs_that_train(model)
    factors = [p for pair in trained for p in (pair.a, pair.b)]
    _Exact(factors).attach(optimizer)
    return corrected(optimizer, _Rite(optimizer, trained), factors)


class _Rite:
    """Steps every pair itself and takes its gradients away, so that AdamW passes over it."""

    def __init__(self, optimizer: Optimizer, trained: Sequence[Pair]) -> None:
        self._optimizer, self._pairs = optimizer, trained

    def __call__(self) -> None:
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for pair in self._pairs:
            if pair.a.grad is None or pair.b.grad is None:
                continue
            # Each factor as (n, side, r): n updates of one parameter, a row for each input or output.
            a, b = pair.a_matrices(whole(pair.a.detach())).mT, pair.b_matrices(whole(pair.b.detach()))
            da, db = pair.a_matrices(whole(pair.a.grad)).mT, pair.b_matrices(whole(pair.b.grad))
            new_a = _stepped(a, da, b, self._optimizer.state[pair.a], groups[id(pair.a)])
            new_b = _stepped(b, db, a, self._optimizer.state[pair.b], groups[id(pair.b)])
            _write(pair.a, new_a.mT.reshape(pair.a.shape))
            _write(pair.b, pair.as_b(new_b))


class _Exact:
    """Has the state of factors loaded as it was saved; torch gives it the dtype of its parameter, which may be half."""

    def __init__(self, factors: Sequence[nn.Parameter]) -> None:
        self._factors = factors
        self._saved: dict[str, Any] = {}

    def attach(self, optimizer: Optimizer) -> None:
        optimizer.register_load_state_dict_pre_hook(self._before)
        optimizer.register_load_state_dict_post_hook(self._after)

    def _before(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        self._saved = saved

    def _after(self, optimizer: Optimizer) -> None:
        saved, self._saved = self._saved, {}
        factors = {id(p) for p in self._factors}
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, held, strict=True):
            values = saved["state"].get(number, {}) if id(parameter) in factors else {}
            for key in values.keys() & _KEPT:
                optimizer.state[parameter][key] = values[key].to(parameter.device)


def _stepped(factor: Tensor, gradient: Tensor, dual: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The factor after a step, in the coordinates ``U`` of the other one, ``U R``, in which its size plays no part.

    Shapes: ``m`` rows of the factor, ``d`` of its dual, ``k`` the smaller of ``d`` and ``r``.

    Args:
        factor: ``(n, m, r)``.
        gradient: ``(n, m, r)``.
        dual: ``(n, d, r)``.
        state: Of the factor's parameter, made at the first step.
        group: Of the factor's parameter.
    """
    basis, r_inverse = _coordinates(dual)  # (n, d, k), (n, r, k)
    unmagnified = gradient @ r_inverse  # (n, m, k)
    count, rows, k = unmagnified.shape
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(unmagnified)
        state["second_moment"] = unmagnified.new_zeros(count, k, k)
        state["escaped"] = unmagnified.new_zeros(count)
        state["basis"] = basis
    before = {key: whole(state[key]).to(factor.device, factor.dtype) for key in _KEPT}
    step = int(state["step"]) + 1
    beta1, beta2 = (_unbiased(beta, step) for beta in group["betas"])

    turn = basis.mT @ before["basis"]  # (n, k, k), from the coordinates of the last step to these
    second = turn @ before["second_moment"] @ turn.mT
    escaped = before["escaped"] + _lost(before["second_moment"], second)  # what these coordinates do not show
    second = beta2 * second + (1 - beta2) * (unmagnified.mT @ unmagnified) / rows
    escaped = beta2 * escaped
    moment = beta1 * before["exp_avg"] @ turn.mT
    moment = moment + (1 - beta1) * unmagnified @ _inverse_root(second, escaped, group["eps"])

    kept = {"exp_avg": moment, "second_moment": second, "escaped": escaped, "basis": basis}
    state.update(kept, step=torch.full_like(state["step"], step))
    return factor * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * moment @ r_inverse.mT


_KEPT = ("exp_avg", "second_moment", "escaped", "basis")


def _coordinates(dual: Tensor) -> tuple[Tensor, Tensor]:
    """``U`` and ``R⁻¹`` of ``dual = U R``; directions that the dual has not (a ``B`` of zero) are passed over."""
    basis, r = torch.linalg.qr(dual)
    return basis, torch.linalg.pinv(r)


def _lost(before: Tensor, now: Tensor) -> Tensor:
    """How much of a second moment a change of coordinates has left out, at most, in one direction: ``(n,)``."""
    values = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh((now + now.mT) / 2)
    trace = (before - now).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(values.amax(-1), trace).clamp(min=0)


def _inverse_root(second: Tensor, escaped: Tensor, eps: float) -> Tensor:
    """``(V + ρ I)^(-1/2)``: ``(n, k, k)``."""
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    roots = (values.clamp(min=0) + escaped[:, None]).sqrt() + eps
    return (vectors / roots[:, None, :]) @ vectors.mT


def _unbiased(beta: float, step: int) -> float:
    """The share of what was, that gives a mean without the zero it began with."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _write(parameter: nn.Parameter, value: Tensor) -> None:
    local(parameter).copy_(local(spread_like(value.to(parameter.dtype), parameter)))
    parameter.grad = None
