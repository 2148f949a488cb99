"""Which jobs of a sweep are trained together on one base, and which go alone, each with its reason.

Works on settings alone, with neither torch nor a model, so that it is told before anything starts. What only the model
itself can say (a layer of an unknown kind, a dropout in it) is found by the worker that loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from lora_lightning.sweeps.packed.packable import PackableJob, precision_of, why_alone

# Of the data, what changes neither how many rows a step has nor what they look like; of the model, what only its
# tokenizer reads. Everything else about both has to be equal.
_OWN = {
    "data": (
        "seed", "samples", "num_workers", "cache", "train_rows", "rows", "val_rows", "val_split", "val_path",
        "val_batch_size", "group_by_length", "pad_to_multiple_of", "on_bad_row",
    ),
    "model": ("chat_template",),
}  # fmt: skip
# What holds for a whole process, so that two jobs in it cannot have it differently.
_OF_PROCESS = {"deterministic": None, "benchmark": None, "detect_anomaly": False}


@dataclass(frozen=True)
class Group:
    """Jobs of one process.

    Attributes:
        jobs: In the order of their numbers.
        alone: Why a single job is not trained with others; None where there are several.
    """

    jobs: tuple[PackableJob, ...]
    alone: str | None = None


def group(jobs: Sequence[PackableJob], *, devices: int = 1) -> list[Group]:
    """Put together what can be trained together.

    How many jobs of a group are trained at once is not settled here: its worker, which knows the model, gives places to
    as many as fit into memory, and the others wait for one.

    Args:
        jobs: Those to run.
        devices: How many groups can run at once. A group is divided as long as there are devices without one.

    Returns:
        All jobs, each in one group; groups in the order of their first jobs.
    """
    groups: list[Group] = []
    alike: list[list[PackableJob]] = []  # neither dicts nor sets: settings cannot be hashed
    for one in sorted(jobs, key=lambda one: one.number):
        if (reason := why_alone(one)) is not None:
            groups.append(Group((one,), reason))
        elif (kin := next((kin for kin in alike if shared(kin[0]) == shared(one)), None)) is not None:
            kin.append(one)
        else:
            alike.append([one])
    for kin in alike:
        parts = divided(kin, round(devices * len(kin) / len(jobs)))
        groups += [Group(part, _why_single(part[0], kin, alike) if len(part) == 1 else None) for part in parts]
    return sorted(groups, key=lambda group: group.jobs[0].number)


def shared(one: PackableJob) -> dict[str, Any]:
    """The settings that jobs on one base must have in common, by their names on the command line."""
    config = one.config
    found: dict[str, Any] = {"trainer.accelerator": one.job.accelerator, "threads": config.get("threads")}
    trainer = config.get("trainer") or {}
    found["trainer.precision"] = precision_of(trainer)
    found |= {f"trainer.{key}": trainer.get(key, default) for key, default in _OF_PROCESS.items()}
    for part, own in _OWN.items():
        found |= {f"{part}.{key}": value for key, value in (config.get(part) or {}).items() if key not in own}
    return found


def divided(jobs: Sequence[PackableJob], parts: int) -> list[tuple[PackableJob, ...]]:
    """Neighbours stay together, and all parts are about as large; never more parts than jobs, and at least one."""
    parts = max(1, min(parts, len(jobs)))
    ends = [len(jobs) * part // parts for part in range(parts + 1)]
    return [tuple(jobs[begin:end]) for begin, end in pairwise(ends)]


def _why_single(one: PackableJob, kin: Sequence[PackableJob], alike: Sequence[Sequence[PackableJob]]) -> str:
    if len(kin) > 1:
        return "it has a device to itself"
    others = [other for other in alike if other is not kin]
    if not others:
        return "there is no other job to train it with"
    # Compared with the largest group; of groups as large, with the one that is most like it.
    nearest = max(others, key=lambda other: (len(other), -len(_differing(one, other[0]))))
    whose = "the others'" if len(nearest) > 1 else f"job {nearest[0].number}'s"
    mine, theirs = shared(one), shared(nearest[0])
    return " and ".join(
        f"its {key} is {_written(mine.get(key))}, {whose} {_written(theirs.get(key))}"
        for key in _differing(one, nearest[0])
    )


def _differing(one: PackableJob, other: PackableJob) -> list[str]:
    mine, theirs = shared(one), shared(other)
    return [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]


def _written(value: Any) -> str:
    """A value as it is written in YAML.

    >>> _written(None), _written(True), _written(4)
    ('null', 'true', '4')
    """
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def told(groups: Sequence[Group]) -> list[str]:
    """What becomes of the jobs, a line for each group, and for each reason to go alone."""
    together = [group for group in groups if len(group.jobs) > 1]
    lines = []
    for group in together:
        numbers = _numbers([one.number for one in group.jobs])
        apart = _differing(group.jobs[0], together[0].jobs[0])
        settings = ", ".join(f"{key}={_written(shared(group.jobs[0]).get(key))}" for key in apart)
        lines.append(f"Jobs {numbers} are trained together on one base{settings and f' ({settings})'}.")
    by_reason: dict[str, list[int]] = {}
    for group in groups:
        if group.alone is not None:
            by_reason.setdefault(group.alone, []).append(group.jobs[0].number)
    for reason, numbers_alone in by_reason.items():
        several = len(numbers_alone) > 1
        who = f"Jobs {_numbers(numbers_alone)} go alone, each" if several else f"Job {numbers_alone[0]} goes alone"
        lines.append(f"{who}: {reason}.")
    return lines


def _numbers(numbers: Sequence[int]) -> str:
    """Numbers in a row as a range.

    >>> _numbers([0, 1, 2, 3, 5, 7, 8])
    '0–3, 5, 7, 8'
    """
    runs = []
    for _, places in groupby(enumerate(sorted(numbers)), key=lambda place: place[1] - place[0]):
        run = [number for _, number in places]
        runs += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return ", ".join(runs)
