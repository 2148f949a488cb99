"""What the losses say: learned by heart, or a learning rate at the edge of what goes well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from lora_lightning.reports.advice.evidence import BARELY, STEPS, Evidence, thirds
from lora_lightning.reports.advice.kinds import Advice, percent
from lora_lightning.reports.advice.rank import with_rank
from lora_lightning.reports.curves import Points

SPIKE = 1.5
"""A training loss is a spike above this many medians of those before it, if it is above that of the start too."""
DROPOUT = 0.3
"""More dropout than this is not advised."""


def overfitting(evidence: Evidence) -> Iterator[Advice]:
    """Validation loss rises while training loss goes on falling."""
    if not evidence.overfits:
        return
    step, lowest = min(evidence.validated, key=lambda point: point[1])
    last_step, last = evidence.validated[-1]
    before = [loss for at, loss in evidence.trained if at <= step]
    after = [loss for at, loss in evidence.trained if at > step]
    if not before or not after:
        return
    around, end = fmean(before[-len(after) :]), fmean(after[-len(before) :])
    if end >= around:
        return
    first = evidence.validated[0][1]
    ways = ["fewer steps (the best checkpoint is that of the lowest loss)"]
    if (dropout := float(evidence.lora.get("lora_dropout") or 0.0)) < DROPOUT:
        ways.append(f"more dropout (lora.lora_dropout={max(0.1, min(2 * dropout, DROPOUT)):g})")
    if evidence.r is not None and evidence.r > 4:
        rank = with_rank(evidence, evidence.r // 2)
        ways.append(f"a lower rank ({rank})" if rank else "a lower rank")
    listed = ", ".join(ways[:-1]) + f" or {ways[-1]}, one at a time" if ways[1:] else ways[0]
    yield Advice(
        "overfitting",
        "warning" if last - lowest > 0.2 * (first - lowest) else "hint",
        f"Validation loss was lowest at step {step} ({lowest:.3f}) and has risen to {last:.3f} at step {last_step}, "
        f"while training loss fell from {around:.3f} to {end:.3f}: the model learns its rows by heart. Take {listed}.",
        {"lowest": lowest, "lowest_step": step, "last": last, "train_before": around, "train_after": end},
        f"trainer.max_steps={step}",
    )


def too_fast(evidence: Evidence) -> Iterator[Advice]:
    """Losses that jump, grow or are no numbers: the learning rate is at the edge, or beyond it."""
    broken = [step for step, loss in (*evidence.trained, *evidence.validated) if not math.isfinite(loss)]
    stopped = str(evidence.result.get("error") or "").startswith("NonFiniteError")
    jumps = spikes(evidence.trained)
    ends = thirds(evidence.trained)
    grown = ends is not None and ends[1] > 1.1 * ends[0]
    if not (broken or stopped or jumps or grown):
        return
    seen = []
    if broken:
        seen.append(f"loss is not a number at step {_listed(broken)}")
    if stopped:
        seen.append(f"after {evidence.steps} steps the loss or its gradients were not finite, and the run was stopped")
    if jumps:
        seen.append(f"training loss jumps at step {_listed(jumps)}")
    if grown and ends is not None:
        seen.append(f"training loss has grown from {ends[0]:.3f} to {ends[1]:.3f}")
    yield Advice(
        "learning rate too high",
        "warning" if broken or stopped or grown else "hint",
        f"{_sentence(seen)}. The learning rate{_told(evidence.rate)} is at the edge: try a third of it.",
        {"not_finite": broken, "spikes": jumps, "train_thirds": ends} | _number(evidence.rate),
        _times(evidence.rate, 1 / 3),
    )


def too_slow(evidence: Evidence) -> Iterator[Advice]:
    """Losses that have barely moved, and adapters that have not either."""
    fallen, steps = evidence.fallen, max((step for step, _ in evidence.validated), default=0)
    if len(evidence.validated) < 2 or steps < STEPS or head_is_missing(evidence):
        return  # training loss alone is that of other rows at each step
    if fallen is None or not -BARELY < fallen < BARELY:
        return
    moved = [row.relative_norm for row in evidence.adapted if row.relative_norm is not None]
    far = f", and the adapters have moved their layers by {percent(fmean(moved))} on average" if moved else ""
    yield Advice(
        "learning rate too low",
        "hint",
        f"After {steps} steps validation loss has changed by {percent(abs(fallen))}{far}. If there is something to "
        f"learn in these rows, the learning rate{_told(evidence.rate)} is too low: try three times as much.",
        {"fallen": fallen, "steps": steps, "relative_norm": fmean(moved) if moved else None} | _number(evidence.rate),
        _times(evidence.rate, 3),
    )


def wrong_head(evidence: Evidence) -> Iterator[Advice]:
    """A classifier whose head does not train."""
    if not head_is_missing(evidence):
        return
    fallen = evidence.fallen
    stuck = fallen is not None and fallen < BARELY
    task = evidence.adapter.get("task_type") or evidence.lora.get("task_type")
    yield Advice(
        "head does not train",
        "warning" if stuck else "hint",
        f"The run classifies, and its adapter (task_type={task}) trains no head: a fresh one stays random"
        + (f", and loss has fallen by only {percent(max(fallen, 0.0))}" if stuck and fallen is not None else "")
        + ". With task_type=SEQ_CLS the head trains in full and is saved with the adapter.",
        {"task_type": task, "fallen": fallen, "modules_to_save": evidence.adapter.get("modules_to_save")},
        "lora.task_type=SEQ_CLS",
    )


def spikes(trained: Points) -> list[int]:
    """Steps at which training loss stands far above what it was shortly before, and above where it began."""
    losses = [loss for _, loss in trained]
    found = []
    for index in range(3, len(losses)):
        before = [loss for loss in losses[max(0, index - 8) : index] if math.isfinite(loss)]
        if before and losses[index] > SPIKE * median(before) and losses[index] > max(losses[:2]):
            found.append(trained[index][0])
    return found


def head_is_missing(evidence: Evidence) -> bool:
    """Whether the run has classified with a head that its adapter does not hold."""
    task = str((evidence.config.get("task") or {}).get("_target_", ""))
    if not task.endswith("SequenceClassification") or not evidence.adapter:
        return False
    saved = evidence.adapter.get("modules_to_save") or evidence.lora.get("modules_to_save")
    return not saved and evidence.adapter.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS")


def _listed(steps: list[int], most: int = 5) -> str:
    return ", ".join(map(str, steps[:most])) + (f" and {len(steps) - most} more" if len(steps) > most else "")


def _sentence(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def _told(rate: tuple[str, float] | None) -> str:
    return f" ({rate[0]}={rate[1]:g})" if rate else ""


def _number(rate: tuple[str, float] | None) -> dict[str, float | None]:
    return {"learning_rate": rate[1] if rate else None}


def _times(rate: tuple[str, float] | None, factor: float) -> str | None:
    """The override for another learning rate, to one digit: 3.333e-4 to 3e-4."""
    return f"{rate[0]}={float(f'{rate[1] * factor:.0e}'):g}" if rate else None
