"""What to set where a training runs out of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_lightning.config_starts import changes_base
from lora_lightning.data.packing import best_fit
from lora_lightning.reports.plan import memory as budget
from lora_lightning.reports.plan.ghost import own_config
from lora_lightning.reports.plan.planned import Plan, plan_of
from lora_lightning.reports.plan.setting import Setting
from lora_lightning.reports.plan.table import size

_OF_WHAT_FAILED = 0.7
"""A remedy takes no more than this share of what ran out of memory."""
_AGAIN = "model.gradient_checkpointing=true"
_LEAST_TOKENS = 2
"""Of a row: the first one is predicted by nothing."""
_MAY_BE_CUT = 0.1
"""So large a share of the rows at most, where their lengths are known."""


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


def remedies(setting: Setting, lengths: Sequence[int] | None = None) -> list[Remedy]:
    """Settings under which a training takes less memory, and learns the same as far as that can be.

    They are a smaller batch with as many rows a step as before, several examples packed into a row in place of padding,
    activations that are computed again in backward, both together, a base in 4 bits on a GPU, and shorter rows. Those
    that fit come first, by how little they change.

    Args:
        setting: That of the training which ran out of memory.
        lengths: Of its padded rows, in tokens, where they are known: by them it is seen whether packing saves memory.
            Batches are as long as the longest, so that shuffling and sorting change nothing about the most at once.

    Returns:
        None at all where nothing of the setting can be smaller.
    """
    capacity = setting.tokens
    if lengths:
        setting = replace(setting, tokens=min(capacity, max(lengths)))
    made = plan_of(setting, calibration=False)
    # What has failed does not fit, however much seems to be free: the process may be limited, or others have taken it.
    room = _OF_WHAT_FAILED * made.memory.total
    if made.available is not None:
        room = min(room, budget.usable(made.available, setting))
    again = None if setting.model.gradient_checkpointing else _tried(_recomputed(setting))
    found = [*_smaller_batch(made, room)]
    if lengths and setting.task == "causal_lm":
        found += _packed(made, lengths, capacity, room)
    if again is not None:
        why = "activations are computed a second time, a third slower"
        found += [Remedy(_AGAIN, why, _total(again, setting.rows))]
        found += [
            Remedy(f"{each.settings} {_AGAIN}", f"{each.why}; {why}", each.total)
            for each in _smaller_batch(again, room)
        ]
    least = replace(setting if again is None else again.setting, rows=1)
    also = [_AGAIN] * (again is not None) + [_batch(setting, 1)] * (setting.rows > 1)
    if _may_have_few_bits(setting):
        few = _tried(replace(least, model=replace(least.model, quantisation="nf4")))
        found += _all_of(["model.quantisation=nf4", *also], "the base in 4 bits, which other numbers come of", few)
    if (tokens := _shorter(setting.tokens, lengths)) is not None:
        cut = sum(length > tokens for length in lengths) / len(lengths) if lengths else None
        why = "longer rows are cut, and counted" if cut is None else f"{cut:.1%} of the rows are longer, and are cut"
        found += _all_of([f"data.max_length={tokens}", *also], why, _tried(replace(least, tokens=tokens)))
    return sorted(found, key=lambda remedy: remedy.total is None or remedy.total > room)


def listed(found: Sequence[Remedy]) -> str:
    """Remedies in lines for people."""
    if not found:
        return "No setting of this training can be smaller: it wants shorter rows, a smaller model, or more memory."
    lines = ["What takes less, to be added to the command:"]
    for remedy in found:
        about = "" if remedy.total is None else f"; about {size(remedy.total)}"
        lines += [f"  {remedy.settings}", f"      {remedy.why}{about}"]
    return "\n".join(lines)


def _smaller_batch(made: Plan, room: float) -> Iterator[Remedy]:
    """The largest batch that fits and is an even part of the present one; none where it is of one row already."""
    setting = made.setting
    if setting.rows > 1:
        smaller = (rows for rows in range(setting.rows - 1, 0, -1) if setting.rows % rows == 0)
        rows = next((rows for rows in smaller if made.with_rows(rows).total <= room), 1)
        yield Remedy(_batch(setting, rows), "as many rows a step, in smaller batches", _total(made, rows))


def _packed(made: Plan, lengths: Sequence[int], capacity: int, room: float) -> Iterator[Remedy]:
    """As many examples a step in fewer rows, each filled up; none where one full row has more than a step, or no less.

    Args:
        made: The plan with padded rows.
        lengths: Of the examples, in tokens.
        capacity: Of a packed row, in tokens.
        room: Bytes.
    """
    setting = made.setting
    in_a_row = len(lengths) / best_fit(sorted(lengths, reverse=True), capacity)[1]
    step = setting.rows * setting.accumulate / in_a_row  # in packed rows
    if not setting.padded or step < 1 or (full := _tried(replace(setting, padded=False, tokens=capacity))) is None:
        return
    rows = next((n for n in range(min(setting.rows, int(step)), 1, -1) if full.with_rows(n).total <= room), 1)
    times = max(1, round(step / rows))
    if full.with_rows(rows).total < made.memory.total and rows * times < setting.rows * setting.accumulate:
        examples = rows * times * in_a_row
        yield Remedy(
            f"data.packing=true data.batch_size={rows} trainer.accumulate_grad_batches={times}",
            f"several examples in a row instead of padding, about {examples:.0f} a step; some models refuse it",
            _total(full, rows),
        )


def _shorter(longest: int, lengths: Sequence[int] | None) -> int | None:
    """Half of the longest row, or what leaves most rows whole; None where that is not much less.

    >>> _shorter(512, None), _shorter(512, [100] * 99 + [512]), _shorter(100, [90] * 9 + [100])
    (256, 256, None)
    """
    whole = sorted(lengths)[math.ceil((1 - _MAY_BE_CUT) * len(lengths)) - 1] if lengths else 0
    tokens = max(longest // 2, whole)
    return tokens if _LEAST_TOKENS <= tokens <= _OF_WHAT_FAILED * longest else None


def _recomputed(setting: Setting) -> Setting:
    return replace(setting, model=replace(setting.model, gradient_checkpointing=True))


def _may_have_few_bits(setting: Setting) -> bool:
    """Whether the base can be read in 4 bits: whole on each GPU, and not to be changed by where the adapter begins."""
    model, start = setting.model, setting.lora.init_lora_weights
    return (
        setting.device == "cuda"
        and setting.strategy in ("single", "ddp")
        and model.quantisation is None
        and not model.in_parts
        and not (changes_base(start) or start == "mica")
        and getattr(own_config(setting), "quantization_config", None) is None
    )


def _tried(setting: Setting) -> Plan | None:
    """A plan; None where the model does not take what is set, as one that cannot compute activations again."""
    try:
        return plan_of(setting, calibration=False)
    except ValueError:  # of ours or of the model's own code
        return None


def _all_of(settings: Sequence[str], why: str, made: Plan | None) -> list[Remedy]:
    return [] if made is None else [Remedy(" ".join(settings), why, _total(made, made.setting.rows))]


def _batch(setting: Setting, rows: int) -> str:
    times = -(-setting.rows // rows) * setting.accumulate
    return f"data.batch_size={rows} trainer.accumulate_grad_batches={times}"


def _total(made: Plan, rows: int) -> float | None:
    weight = made.with_rows(rows)
    return None if weight.activations is None else weight.total
