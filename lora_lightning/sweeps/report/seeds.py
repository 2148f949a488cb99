"""Jobs that differ in their seed alone, taken together."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from lora_lightning.sweeps.report.collect import Row, Sweep


class Setting(NamedTuple):
    """One setting, tried with several seeds.

    Attributes:
        settings: The value of each swept key but the seed.
        mean: Of the metric over the finished jobs that have a finite one; None where none has.
        deviation: The sample's standard deviation; None for less than two.
        values: How many values the mean is of.
        numbers: The finished jobs.
    """

    settings: dict[str, Any]
    mean: float | None
    deviation: float | None
    values: int
    numbers: list[int]


def over_seeds(sweep: Sweep) -> list[Setting]:
    """Every setting with its mean over the seeds, the best mean first.

    A setting of which a job came to no finite value stands behind those of which all did: its mean is that of the
    lucky ones.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sweep.of_state("finished"):
        same = tuple(repr(row.settings.get(key, "")) for key in sweep.setting_keys)
        groups.setdefault(same, []).append(row)
    settings = [_setting(sweep, rows) for rows in groups.values()]
    return sorted(settings, key=lambda each: (len(each.numbers) > each.values, sweep.cost(each.mean), each.numbers))


def _setting(sweep: Sweep, rows: list[Row]) -> Setting:
    values = [row.metric for row in rows if row.metric is not None]
    return Setting(
        settings={key: rows[0].settings[key] for key in sweep.setting_keys if key in rows[0].settings},
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        values=len(values),
        numbers=[row.number for row in rows],
    )
