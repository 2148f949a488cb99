"""What one step of training takes: its real code run over fake tensors, a few blocks deep, with a row more and without.

Nothing is assumed of an architecture. What forward keeps for backward is what autograd holds then; every further block
of a kind takes what the second one took, and every further row what the second one took, since rows do not see each
other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import masking_utils

from lora_lightning.layers.chunks import MOST_BYTES, SHARE_OF_FREE
from lora_lightning.layers.cross_entropy import linear_cross_entropy
from lora_lightning.reports.plan.ghost import Ghost
from lora_lightning.reports.plan.metre import Metre
from lora_lightning.reports.plan.setting import Setting
from lora_lightning.strategies.blocks import blocks
from lora_lightning.tasks.head import head_of, logits_of, lora_of, root_of
from lora_lightning.tasks.loss import accepted_by, classification_loss

_MOST_KINDS = 4
"""A model with more kinds of blocks than this is run at its whole depth."""


@dataclass(frozen=True)
class Cost:
    """What a step of so many rows takes.

    Attributes:
        kept: Bytes that forward keeps for backward.
        loss: Bytes that the output layer and the loss take besides, for a moment.
        backward: Bytes that backward takes besides what forward kept, at most.
        flops: Floating-point operations of products, forward and backward.
        moved: Bytes that all other operations write.
    """

    kept: float
    loss: float
    backward: float
    flops: float
    moved: float

    def plus(self, other: Cost, times: float = 1) -> Cost:
        """This and so many times another."""
        return Cost(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(Cost)))

    def minus(self, other: Cost) -> Cost:
        """What this takes more than another."""
        return self.plus(other, -1)


@dataclass(frozen=True)
class StepCost:
    """What a step takes, by its number of rows.

    Attributes:
        rows: So many rows were run with.
        those: What they take.
        further: Of every further row.
        row_logits: Bytes of one row's logits while the loss is made, those of all its tokens that have a label.
        most_logits: No more of them than this are there at once.
        kept_whole: As ``those.kept`` and ``further.kept``, were nothing computed again.
    """

    rows: int
    those: Cost
    further: Cost
    row_logits: int
    most_logits: int
    kept_whole: tuple[float, float]

    def of(self, rows: int) -> Cost:
        """What so many rows take; the loss's logits come in chunks."""
        cost = self.those.plus(self.further, rows - self.rows)
        logits = min(rows * self.row_logits, self.most_logits)
        return Cost(cost.kept, max(0.0, cost.loss) + logits, max(0.0, cost.backward), cost.flops, cost.moved)

    def laid_out(self, rows: int) -> float:
        """Bytes of so many rows that have been there together or one after another: what holes come of."""
        those, further = self.kept_whole
        return those + (rows - self.rows) * further


def step_cost(ghost: Ghost, setting: Setting, free: int, *, whole_logits: bool = False) -> StepCost:
    """Find out what a step takes.

    Args:
        ghost: The model with its adapter.
        setting: Rows, tokens of a row, share of labels, precision.
        free: Bytes that are free for the loss, whose chunks go by that.
        whole_logits: Whether the output layer's products are made as a whole, as under tensor parallel.

    Raises:
        Exception: Whatever the model's code raises where it asks its tensors for numbers that fake ones do not have.
    """
    root: Any = root_of(ghost.model)
    head = None if whole_logits or setting.task != "causal_lm" else head_of(root)
    row_logits = 0 if head is None else scored(setting, 1) * row_bytes(head, setting, ghost.dtype)
    most_logits = min(MOST_BYTES[setting.device], free // SHARE_OF_FREE)
    # The most in backward is another part's with few rows than with many, so that it is looked for where it is wanted.
    batches = (setting.rows, setting.rows + 1)
    with ghost.active():
        those, more = (_whole_depth(ghost.model, head, setting, rows) for rows in batches)
    further = more.minus(those)
    whole = (those.kept, further.kept)
    if setting.model.gradient_checkpointing:
        with ghost.keeping_all():
            kept, more_kept = (_whole_depth(ghost.model, head, setting, rows).kept for rows in batches)
        whole = (kept, more_kept - kept)
    return StepCost(setting.rows, those, further, row_logits, most_logits, whole)


def _whole_depth(model: nn.Module, head: nn.Linear | None, setting: Setting, rows: int) -> Cost:
    kinds = _kinds(blocks(model))
    if len(kinds) > _MOST_KINDS:
        return _run(model, head, setting, rows)
    first = [members[0] for members in kinds]
    with _only(model, first):
        least = _run(model, head, setting, rows)
    total = least
    for members in kinds:
        if len(members) > 1:
            with _only(model, [*first, members[1]]):
                each = _run(model, head, setting, rows).minus(least)
            # What is taken for a moment is taken by one block after another.
            total = total.plus(Cost(each.kept, 0, 0, each.flops, each.moved), len(members) - 1)
    return total


def _kinds(found: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Blocks that are alike: of one class, with the same parts of the same shapes."""
    alike: dict[Any, list[nn.Module]] = {}
    for block in found:
        parts = tuple((name, type(part)) for name, part in block.named_modules())
        shapes = tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
        alike.setdefault((parts, shapes), []).append(block)
    return list(alike.values())


@contextlib.contextmanager
def _only(model: nn.Module, kept: Sequence[nn.Module]) -> Iterator[None]:
    """Leave all repeated blocks out but these."""
    every, stay = {id(block) for block in blocks(model)}, {id(block) for block in kept}
    before = [(m, dict(m._modules)) for m in model.modules() if isinstance(m, nn.ModuleList)]
    try:
        for stack, children in before:
            if any(id(child) in every for child in children.values()):
                left = [child for child in children.values() if id(child) not in every or id(child) in stay]
                stack._modules = {str(place): child for place, child in enumerate(left)}  # type: ignore[assignment]
        yield
    finally:
        for stack, children in before:
            stack._modules = children  # type: ignore[assignment]


def _run(model: nn.Module, head: nn.Linear | None, setting: Setting, rows: int) -> Cost:
    """One step forward and backward, with all logits of the loss at once where the output layer gives losses."""
    metre = Metre(answer=not setting.padded)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = torch.float16 if setting.precision == "16-mixed" else torch.bfloat16
    mixed = torch.autocast("cpu", dtype, enabled=setting.precision.endswith("-mixed"))
    with _as_in_a_run(), metre:
        answer = _Answer(head, setting, metre)
        with mixed:
            total = _loss(model, answer, setting, rows)
        kept = metre.now if answer.before is None else answer.before
        loss, metre.most = metre.most - kept, metre.now
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        backward = metre.most - kept
        del gradients
    return Cost(kept, loss - answer.logits, backward, metre.flops, metre.moved)


class _Answer:
    """What an output layer answers in a training: losses instead of logits.

    Attributes:
        before: Bytes that were alive before it did; None where it has not.
        logits: Bytes of the logits that were made at once.
    """

    def __init__(self, head: nn.Linear | None, setting: Setting, metre: Metre) -> None:
        self._head, self._setting, self._metre = head, setting, metre
        self.before: int | None = None
        self.logits = 0

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """In here the layer answers so."""
        if self._head is None:
            yield
            return
        self._head.forward = MethodType(self._losses, self._head)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._head.forward  # the class's own again

    def _losses(self, head: nn.Linear, x_BTD: Tensor) -> Tensor:
        self.before = self._metre.now
        rows = scored(self._setting, len(x_BTD))
        self.logits = rows * row_bytes(head, self._setting, x_BTD.dtype)
        at_K = torch.zeros(rows, dtype=torch.long)
        x_KD = x_BTD.flatten(0, 1).index_select(0, at_K)
        losses_K = linear_cross_entropy(x_KD, head.weight, head.bias, at_K, lora=lora_of(head), rows_at_once=rows)
        return losses_K[None, :, None]


def _loss(model: nn.Module, answer: _Answer, setting: Setting, rows: int) -> Tensor:
    ids_BT = torch.zeros(rows, setting.tokens, dtype=torch.long)
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if setting.task == "sequence_classification":
        return classification_loss(model, batch | {"labels": torch.zeros(rows, dtype=torch.long)}).total
    inputs: dict[str, Any] = {"use_cache": False, "return_dict": True, **batch}
    taken = accepted_by(model, root_of(model))
    with answer.given():
        logits = logits_of(model(**{name: value for name, value in inputs.items() if name in taken}))
    if answer.before is not None:
        return logits.sum()
    targets_K = torch.zeros(scored(setting, rows), dtype=torch.long)
    return functional.cross_entropy(logits.flatten(0, 1).index_select(0, targets_K).float(), targets_K, reduction="sum")


def scored(setting: Setting, rows: int) -> int:
    """How many tokens of so many rows have a label."""
    return max(1, round(rows * setting.tokens * setting.scored))


def row_bytes(head: nn.Linear, setting: Setting, dtype: torch.dtype) -> int:
    """What the logits of one token take: in the dtype of the product, and wide where that is not."""
    itemsize = 2 if setting.precision.endswith("-mixed") else dtype.itemsize
    return head.weight.shape[0] * (itemsize if itemsize >= 4 else itemsize + 4)


@contextlib.contextmanager
def _as_in_a_run() -> Iterator[None]:
    """Masks are made as in a run: transformers would take fake tensors for those of an export, and make them all."""
    before = getattr(masking_utils, "is_tracing", None)
    if before is None:
        yield
        return
    masking_utils.is_tracing = lambda *tensors: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before
