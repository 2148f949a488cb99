"""The table of a sweep's jobs, which also says at once that none of them will report what they are compared by."""

from __future__ import annotations

from lora_lightning.errors import did_you_mean
from lora_lightning.sweeps.engine import Outcome
from lora_lightning.sweeps.table import LiveTable


class SweepTable(LiveTable):
    """Shows the jobs of a sweep.

    Args:
        metric: What they are compared by: a number of ``result.json``; None: what a job's function has returned.
    """

    def __init__(self, metric: str | None) -> None:
        super().__init__(metric=metric or "value")
        self._expected = metric

    def ended(self, outcome: Outcome) -> None:
        """Look at the result of the first job that has finished."""
        super().ended(outcome)
        if self._expected is None or outcome.state != "finished" or outcome.result is None:
            return
        if self._expected not in outcome.result:
            known = sorted(key for key, value in outcome.result.items() if isinstance(value, float))
            self.told(
                f"Job {outcome.job.number} reports no {self._expected!r}{did_you_mean(self._expected, known)}, and the "
                f"others will not either: optimized_metric may be one of {', '.join(known)}. They go on; "
                "scripts/sweep_report.py compares them by another metric, with --metric"
            )
        self._expected = None
