"""What to set where a training runs out of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from lora_lightning.reports.plan import memory as budget
from lora_lightning.reports.plan.planned import Plan, plan_of
from lora_lightning.reports.plan.setting import Setting

_OF_WHAT_FAILED = 0.7
"""A remedy takes no more than this share of what ran out of memory."""


class Remedy(NamedTuple):
    """A way to need less memory.

    Attributes:
        settings: To be added to the command.
        why: What they do, and what they cost.
        total: Bytes of a device with them; None where that is not known.
    """

    settings: str
    why: str
    total: float | None


def remedies(setting: Setting) -> list[Remedy]:
    """Settings under which a training takes less memory, and learns the same as far as that can be.

    They are a smaller batch with as many rows a step as before, activations that are computed again in backward, both
    together, a base in 4 bits on a GPU, and shorter rows. Those that fit come first, by how little they change.

    Args:
        setting: That of the training which ran out of memory.
    """
    made = plan_of(setting, calibration=False)
    # What has failed does not fit, however much seems to be free: the process may be limited, or others have taken it.
    room = _OF_WHAT_FAILED * made.memory.total
    if made.available is not None:
        room = min(room, budget.usable(made.available, setting))
    again = replace(setting, model=replace(setting.model, gradient_checkpointing=True))
    recomputed = made if again == setting else plan_of(again, calibration=False)
    found = _smaller_batch(made, room)
    if recomputed is not made:
        settings, why = "model.gradient_checkpointing=true", "activations are computed a second time, a third slower"
        found += [Remedy(settings, why, _total(recomputed, setting.rows))]
        found += [
            Remedy(f"{each.settings} {settings}", f"{each.why}; {why}", each.total)
            for each in _smaller_batch(recomputed, room)
        ]
    if setting.device == "cuda" and setting.model.quantisation is None:
        few_bits = replace(again, model=replace(again.model, quantisation="nf4"), rows=1)
        settings = " ".join(["lora=qlora model.gradient_checkpointing=true", _batch(setting, 1)])
        total = _total(plan_of(few_bits, calibration=False), 1)
        found += [Remedy(settings, "the base in 4 bits, which other numbers come of", total)]
    if setting.tokens > 1:
        shorter = replace(recomputed.setting, tokens=setting.tokens // 2, rows=1)
        settings = " ".join([f"data.max_length={shorter.tokens} model.gradient_checkpointing=true", _batch(setting, 1)])
        total = _total(plan_of(shorter, calibration=False), 1)
        found += [Remedy(settings, "longer rows are cut, and counted", total)]
    return sorted(found, key=lambda remedy: remedy.total is None or remedy.total > room)


def listed(found: list[Remedy]) -> str:
    """Remedies in lines for people."""
    lines = ["What takes less, to be added to the command:"]
    for remedy in found:
        about = "" if remedy.total is None else f"; about {remedy.total / 1e9:.2f} GB"
        lines += [f"  {remedy.settings}", f"      {remedy.why}{about}"]
    return "\n".join(lines)


def _smaller_batch(made: Plan, room: float) -> list[Remedy]:
    """The largest batch that fits and is an even part of the present one; none where it is of one row already."""
    setting = made.setting
    if setting.rows == 1:
        return []
    smaller = (rows for rows in range(setting.rows - 1, 0, -1) if setting.rows % rows == 0)
    rows = next((rows for rows in smaller if made.with_rows(rows).total <= room), 1)
    return [Remedy(_batch(setting, rows), "as many rows a step, in smaller batches", _total(made, rows))]


def _batch(setting: Setting, rows: int) -> str:
    times = -(-setting.rows // rows) * setting.accumulate
    return f"data.batch_size={rows} trainer.accumulate_grad_batches={times}"


def _total(made: Plan, rows: int) -> float | None:
    weight = made.with_rows(rows)
    return None if weight.activations is None else weight.total
