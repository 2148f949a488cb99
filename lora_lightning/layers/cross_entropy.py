"""The head of a language model and its loss in one step, a few rows at a time, so that logits never exist as a whole.

Shapes: K rows (positions that are scored), D the width of the model, V tokens in the vocabulary, R the rank of an
adapter on the head, C the rows of one chunk.

The gradient is computed in forward, while the logits of a chunk are there: each row's loss has a gradient of its own,
and whatever is done with the losses later (a sum, a mean, weights) multiplies that row. Cut Cross-Entropy (arXiv
2411.09009) and Liger (arXiv 2410.10989) save the logits likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.layers.chunks import chunk_rows
from lora_lightning.layers.functional import PLAIN, transformed
from lora_lightning.layers.row_losses import PLAIN_FORM, Form, Scoring, score_rows


class HeadLora(NamedTuple):
    """A low-rank update of a head, ``s · (drop(x) Aᵀ) Bᵀ``."""

    a_RD: Tensor
    b_VR: Tensor
    scaling: float
    dropout: float = 0.0


def linear_cross_entropy(
    x_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    *,
    form: Form = PLAIN_FORM,
    label_smoothing: float = 0.0,
    lora: HeadLora | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """Cross-entropies of ``form(x Wᵀ + b)``, each row's by itself.

    The products are computed in the dtype of ``x`` (autocast's where it is on), the softmax in float32 or float64.
    Gradients of a weight, a bias or an adapter that train are exact for any use of the losses; they are at their
    cheapest where all losses get the same weight, as in a sum.

    Args:
        x_KD: What the head gets, (K, D); K may be 0.
        weight_VD: The head's weight, (V, D).
        bias_V: Its bias, (V,), or None.
        targets_K: The tokens to be predicted, (K,), all in 0 … V−1.
        form: How the head's products become logits.
        label_smoothing: This share of each target is spread evenly over the vocabulary.
        lora: An adapter on the head.
        rows_at_once: Rows of a chunk; None takes what suits the memory that is free.

    Returns:
        The losses, (K,), in float32, or in float64 where ``x`` is. They can be differentiated once.
    """
    if torch.is_autocast_enabled(kind := x_KD.device.type):
        dtype = torch.get_autocast_dtype(kind)
        x_KD, weight_VD, bias_V = x_KD.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        options: Any = {"label_smoothing": label_smoothing, "lora": lora, "rows_at_once": rows_at_once}
        with torch.autocast(kind, enabled=False):
            return linear_cross_entropy(x_KD, weight_VD, bias_V, targets_K, form=form, **options)
    u_KR = b_VR = None
    if lora is not None:
        a_RD, b_VR = lora.a_RD.to(x_KD.dtype), lora.b_VR.to(x_KD.dtype)
        u_KR = F.linear(F.dropout(x_KD, lora.dropout), a_RD) * lora.scaling
    head = _Head(x_KD, weight_VD, bias_V, u_KR, b_VR)
    # Where the dtypes differ, F.linear says what is wrong.
    if unseen() or not is_plain(*head) or x_KD.dtype != weight_VD.dtype:
        return _composed(head, targets_K, form, label_smoothing)
    rows = rows_at_once or chunk_rows(len(x_KD), _row_bytes(x_KD.dtype, len(weight_VD), form), x_KD.device)
    scoring = Scoring(form, label_smoothing)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head):
        return _LinearCrossEntropy.apply(*head, targets_K, scoring, rows)
    losses_K = x_KD.new_empty(len(x_KD), dtype=_wide(x_KD.dtype))
    with torch.no_grad():
        for chunk, losses_C, _ in _chunks(head, targets_K, scoring, rows, gradient=False):
            losses_K[chunk] = losses_C
    return losses_K


class _Head(NamedTuple):
    """``x Wᵀ + b + u Bᵀ``."""

    x_KD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    u_KR: Tensor | None
    b_VR: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`.

    Saved are the gradients of each row with respect to ``x`` and ``u``, and those of the sum of all losses with respect
    to the parameters that train. These are multiplied by the gradient of the losses where that is one number; where
    the rows get different ones, the chunks are gone through again.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        head, (targets_K, ctx.scoring, ctx.rows) = _Head(*inputs[:5]), inputs[5:]
        needs = ctx.needs_input_grad[:5]
        losses_K, gradients = _walk(head, targets_K, ctx.scoring, ctx.rows, needs)
        ctx.trains = any((needs[1], needs[2], needs[4]))
        ctx.save_for_backward(*gradients, *((*head, targets_K) if ctx.trains else ()))
        return losses_K

    @staticmethod
    def backward(ctx: Any, weights_K: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss whose logits were never kept can be differentiated once: for second derivatives "
                "(create_graph=True), take the loss of whole logits, such as transformers' model(**batch).loss"
            )
        dx_KD, dweight_VD, dbias_V, du_KR, db_VR, *rest = ctx.saved_tensors
        if ctx.trains:
            constant = _constant(weights_K)
            if constant is None:
                head, targets_K = _Head(*rest[:5]), rest[5]
                needs = (False, *ctx.needs_input_grad[1:3], False, ctx.needs_input_grad[4])
                _, sums = _walk(head, targets_K, ctx.scoring, ctx.rows, needs, weights_K)
                _, dweight_VD, dbias_V, _, db_VR = sums
            else:
                dweight_VD, dbias_V, db_VR = (
                    None if each is None else each * constant.to(each.dtype) for each in (dweight_VD, dbias_V, db_VR)
                )
        dx_KD, du_KR = (None if d is None else d * weights_K[:, None].to(d.dtype) for d in (dx_KD, du_KR))
        return dx_KD, dweight_VD, dbias_V, du_KR, db_VR, None, None, None


def _walk(
    head: _Head,
    targets_K: Tensor,
    scoring: Scoring,
    rows: int,
    needs: tuple[bool, ...],
    weights_K: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses of all rows, and the gradients that are needed, in the order of the head's parts.

    Those of ``x`` and ``u`` are of each row's own loss, the others of the sum of the losses, weighted if so wished.
    """
    x_KD, weight_VD, bias_V, u_KR, b_VR = head
    wide = _wide(x_KD.dtype)
    losses_K = x_KD.new_empty(len(x_KD), dtype=wide)
    dx_KD = torch.empty_like(x_KD) if needs[0] else None
    du_KR = torch.empty_like(u_KR) if needs[3] and u_KR is not None else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
    dbias_V = torch.zeros_like(bias_V, dtype=wide) if needs[2] and bias_V is not None else None
    # Row-major over the long side: several times faster at a small rank than its transpose.
    db_RV = b_VR.new_zeros(b_VR.shape[::-1], dtype=wide) if needs[4] and b_VR is not None else None
    for chunk, losses_C, dz_CV in _chunks(head, targets_K, scoring, rows, gradient=True):
        losses_K[chunk] = losses_C
        if dx_KD is not None:
            torch.mm(dz_CV, weight_VD, out=dx_KD[chunk])
        if du_KR is not None and b_VR is not None:
            torch.mm(dz_CV, b_VR, out=du_KR[chunk])
        if weights_K is not None:
            dz_CV.mul_(weights_K[chunk, None].to(dz_CV.dtype))
        if dweight_VD is not None:
            _add_product(dweight_VD, dz_CV.t(), x_KD[chunk])
        if dbias_V is not None:
            dbias_V += dz_CV.sum(0, dtype=wide)
        if db_RV is not None and u_KR is not None:
            _add_product(db_RV, u_KR[chunk].t(), dz_CV)
    return losses_K, [
        dx_KD,
        None if dweight_VD is None else dweight_VD.to(weight_VD.dtype),
        None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype),
        du_KR,
        None if db_RV is None else db_RV.t().to(x_KD.dtype),
    ]


def _chunks(
    head: _Head, targets_K: Tensor, scoring: Scoring, rows: int, *, gradient: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Go through the rows: which they are, their losses (C,), and the gradient (C, V) of each by the head's products.

    The gradient lies in memory that the next chunk writes over, and is not made unless asked for.
    """
    x_KD, weight_VD, bias_V, u_KR, b_VR = head
    products_CV = x_KD.new_empty(min(rows, len(x_KD)), len(weight_VD))
    wide = _wide(x_KD.dtype)
    wide_CV = products_CV if wide == x_KD.dtype else torch.empty_like(products_CV, dtype=wide)
    for start in range(0, len(x_KD), rows):
        chunk = slice(start, min(start + rows, len(x_KD)))
        products, logits = products_CV[: chunk.stop - start], wide_CV[: chunk.stop - start]
        if bias_V is None:
            torch.mm(x_KD[chunk], weight_VD.t(), out=products)
        else:
            torch.addmm(bias_V, x_KD[chunk], weight_VD.t(), out=products)
        if u_KR is not None and b_VR is not None:
            products.addmm_(u_KR[chunk], b_VR.t())
        if logits is not products:
            logits.copy_(products)
        losses_C, d_CV = score_rows(logits, targets_K[chunk], scoring, gradient=gradient)
        yield chunk, losses_C, d_CV if d_CV.dtype == products.dtype else products.copy_(d_CV)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are torch's own and no subclass (DTensor, quantised) that brings operations along."""
    return all(t is None or type(t) in PLAIN for t in tensors)


def unseen() -> bool:
    """Whether what is computed now is only recorded, or transformed as a whole (``torch.compile``, ``torch.func``)."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def _composed(head: _Head, targets_K: Tensor, form: Form, label_smoothing: float) -> Tensor:
    x_KD, weight_VD, bias_V, u_KR, b_VR = head
    products = F.linear(x_KD, weight_VD, bias_V)
    if u_KR is not None and b_VR is not None:
        products = products + F.linear(u_KR, b_VR)
    logits = form.of(products.to(_wide(products.dtype)))
    return F.cross_entropy(logits, targets_K, reduction="none", label_smoothing=label_smoothing)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _row_bytes(dtype: torch.dtype, vocabulary: int, form: Form) -> int:
    """Memory that one row takes while it is scored: the products, the same in wide numbers, the slope of a cap."""
    copies = [dtype] + [_wide(dtype)] * ((dtype != _wide(dtype)) + (form.softcap is not None))
    return vocabulary * sum(each.itemsize for each in copies)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _constant(weights_K: Tensor) -> Tensor | None:
    """The one number that all rows are weighted with, if it is one."""
    if not len(weights_K):
        return weights_K.new_zeros(())
    first = weights_K[0]
    same = not any(weights_K.stride()) or bool((weights_K == first).all())  # a sum's gradient is one number, spread
    return first if same else None
