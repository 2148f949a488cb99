"""What the losses say: learned by heart, or a learning rate at the edge of what goes well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from lora_lightning.reports.advice.evidence import Evidence, thirds
from lora_lightning.reports.advice.kinds import Advice, percent
from lora_lightning.reports.advice.rank import with_rank
from lora_lightning.reports.curves import Points

SPIKE = 1.5
"""A training loss is a spike above this many medians of those before it, if it is above that of the start too."""
BARELY = 0.02
"""A loss that has fallen by less than this share of itself has barely moved."""
STEPS = 20
"""Of fewer steps nobody expects much."""


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
    dropout = float(evidence.lora.get("lora_dropout") or 0.0)
    overrides = [f"trainer.max_steps={step}" if step else "", f"lora.lora_dropout={max(0.1, min(2 * dropout, 0.3)):g}"]
    if evidence.r is not None and evidence.r > 4:
        overrides.append(with_rank(evidence, evidence.r // 2))
    yield Advice(
        "overfitting",
        "warning" if last - lowest > 0.2 * (first - lowest) else "hint",
        f"Validation loss was lowest at step {step} ({lowest:.3f}) and has risen to {last:.3f} at step {last_step}, "
        f"while training loss fell from {around:.3f} to {end:.3f}: the model learns its rows by heart. Take fewer "
        "steps (the best checkpoint is that of the lowest loss), more dropout, or a lower rank, one at a time.",
        {"lowest": lowest, "lowest_step": step, "last": last, "train_before": around, "train_after": end},
        " ".join(filter(None, overrides)),
    )


def too_fast(evidence: Evidence) -> Iterator[Advice]:
    """Losses that jump, grow or are no numbers: the learning rate is at the edge, or beyond it."""
    broken = [step for step, loss in (*evidence.trained, *evidence.validated) if not math.isfinite(loss)]
    jumps = spikes(evidence.trained)
    ends = thirds(evidence.trained)
    grown = ends is not None and ends[1] > 1.1 * ends[0]
    if not (broken or jumps or grown):
        return
    seen = []
    if broken:
        seen.append(f"loss is not a number at step {_listed(broken)}")
    if jumps:
        seen.append(f"training loss jumps at step {_listed(jumps)}")
    if grown and ends is not None:
        seen.append(f"training loss has grown from {ends[0]:.3f} to {ends[1]:.3f}")
    rate = evidence.learning_rate
    yield Advice(
        "learning rate too high",
        "warning" if broken or grown else "hint",
        f"{_sentence(seen)}. The learning rate{f' ({rate:g})' if rate else ''} is at the edge: try a third of it.",
        {"not_finite": broken, "spikes": jumps, "train_thirds": ends, "learning_rate": rate},
        f"learning_rate={_rounded(rate / 3):g}" if rate else None,
    )


def too_slow(evidence: Evidence) -> Iterator[Advice]:
    """Losses that have barely moved, and adapters that have not either."""
    fallen = loss_fallen(evidence)
    steps = max((step for step, _ in evidence.validated), default=0)
    if len(evidence.validated) < 2 or steps < STEPS or head_is_missing(evidence):
        return  # training loss alone is that of other rows at each step
    if fallen is None or not -BARELY < fallen < BARELY:
        return
    moved = [row.relative_norm for row in evidence.adapted if row.relative_norm is not None]
    rate = evidence.learning_rate
    far = f", and the adapters have moved their layers by {percent(fmean(moved))} on average" if moved else ""
    yield Advice(
        "learning rate too low",
        "hint",
        f"After {steps} steps validation loss has changed by {percent(abs(fallen))}{far}. If there is something to "
        f"learn in these rows, the learning rate{f' ({rate:g})' if rate else ''} is too low: try three times as much.",
        {"fallen": fallen, "steps": steps, "learning_rate": rate, "relative_norm": fmean(moved) if moved else None},
        f"learning_rate={_rounded(3 * rate):g}" if rate else None,
    )


def wrong_head(evidence: Evidence) -> Iterator[Advice]:
    """A classifier whose head does not train."""
    if not head_is_missing(evidence):
        return
    fallen = loss_fallen(evidence)
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


def loss_fallen(evidence: Evidence) -> float | None:
    """The share of itself by which validation loss (else training loss) has fallen; None where that is not known."""
    if len(evidence.validated) >= 2:
        first, last = evidence.validated[0][1], evidence.validated[-1][1]
    elif (ends := thirds(evidence.trained)) is not None:
        first, last = ends
    else:
        return None
    return (first - last) / abs(first) if first and math.isfinite(first - last) else None


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


def _rounded(rate: float) -> float:
    """To one digit: 3.333e-4 to 3e-4."""
    return float(f"{rate:.0e}")
