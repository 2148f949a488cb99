"""The trials of a search, as its study has them: asked for, told of, and found again when a search goes on.

A trial's number is optuna's. Its job has a number of its own, since a trial that repeats an earlier one is not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.cli.search.options import Options
from lora_lightning.cli.search.space import Choices, Dimension, Space
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.study import PRUNED, STUDY, Note, mend, open_storage

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

# Attributes of a trial in the study.
JOB = "job"
"""The number of its job."""
TWIN = "same_as"
"""The number of the earlier trial that it repeats."""
FAILED = "failed"
"""Why it has failed."""


class Trials:
    """The study in the folder of a search, which is made there if need be.

    Args:
        folder: Of the search.
        space: What is searched.
        options: How.

    Attributes:
        study: Optuna's.

    Raises:
        LoraConfigError: The folder holds another search.
    """

    def __init__(self, folder: Path, space: Space, options: Options) -> None:
        import optuna

        self._path, self._space, self._options = folder / STUDY, space, options
        self._distributions = {key: _distribution(values) for key, values in space.searched.items()}
        mend(self._path)
        self._storage = open_storage(self._path)
        names = [each.study_name for each in self._storage.get_all_studies()]
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=names[0] if names else folder.name,
            directions=options.directions,  # type: ignore[arg-type]  # checked there
            load_if_exists=True,
        )
        # Samplers that have come to the end of a grid end a loop of optuna's own, which this is not.
        self.study.stop = lambda: None  # type: ignore[method-assign]
        self._check_is_same(space.described() | {"directions": options.directions})

    def all(self, *states: str) -> list[FrozenTrial]:
        """The trials so far, or those in states of optuna's: ``RUNNING``, ``COMPLETE``, ``PRUNED``, ``FAIL``."""
        return [trial for trial in self.study.trials if not states or trial.state.name in states]

    def best(self) -> list[FrozenTrial]:
        """The best of those that came to their end; of several values, all that none betters in each of them."""
        if not self.all("COMPLETE"):
            return []
        return [self.study.best_trial] if len(self.study.directions) == 1 else self.study.best_trials

    def left_running(self) -> dict[int, FrozenTrial]:
        """Those that were running when an earlier process of this search ended, by the number of their job."""
        left = {}
        for trial in self.all("RUNNING"):
            if JOB in trial.user_attrs:
                left[trial.user_attrs[JOB]] = trial
            elif TWIN not in trial.user_attrs:
                self.fail(trial.number, "the search was ended before it began")
        return left

    def ask(self, most: int) -> dict[int, FrozenTrial]:
        """The next trials, by the number of their job; none when there are as many as are wanted, or nothing is new.

        Those that repeat an earlier one are not among them: they share what comes of that one.
        """
        while True:
            self.settle_twins()
            trials = self.all()
            tried = sum(JOB in trial.user_attrs for trial in trials)
            wanted = min(most, self._options.n_trials - len(trials), self._space.size() - tried)
            if wanted <= 0:
                return {}
            if new := self._asked(int(wanted)):
                return new

    def tell(self, number: int, value: Any) -> None:
        """Note what the job of a trial has returned."""
        from optuna.trial import TrialState

        if PRUNED in self.study.trials[number].user_attrs:
            self.study.tell(number, state=TrialState.PRUNED)
            return
        directions = self.study.directions
        several = len(directions) > 1
        values = [_number(each) for each in (value if several and isinstance(value, (list, tuple)) else [value])]
        numbers = [each for each in values if each is not None]
        if len(numbers) < len(values) or len(values) != len(directions):
            self.fail(
                number, f"it returned {value!r} and not {f'{len(directions)} numbers' if several else 'a number'}"
            )
            return
        # What has diverged is the worst there is, and no reason to try the like of it again.
        worst = [math.inf if each.name == "MINIMIZE" else -math.inf for each in directions]
        self.study.tell(number, [bad if math.isnan(each) else each for each, bad in zip(numbers, worst, strict=True)])

    def fail(self, number: int, why: str) -> None:
        """Note that a trial has failed."""
        from optuna.trial import TrialState

        self._storage.set_trial_user_attr(self._id(number), FAILED, why)
        self.study.tell(number, state=TrialState.FAIL)

    def settle_twins(self) -> None:
        """Give those that repeat another what came of that one."""
        from optuna.trial import TrialState

        trials = self.all()
        for trial in (each for each in self.all("RUNNING") if TWIN in each.user_attrs):
            twin = trials[trial.user_attrs[TWIN]]
            if twin.state == TrialState.COMPLETE:
                self.study.tell(trial.number, twin.values)
            elif twin.state == TrialState.PRUNED:
                for step, value in twin.intermediate_values.items():
                    self._storage.set_trial_intermediate_value(self._id(trial.number), step, value)
                self.study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self.fail(trial.number, f"it repeats trial {twin.number}, which failed")

    def note(self, number: int, monitor: str, pruner: str | Mapping[str, Any]) -> Note:
        """What the job of a trial has to know to report to the study."""
        plain = pruner if isinstance(pruner, str) else dict(pruner)
        return Note(str(self._path), self.study.study_name, number, monitor, plain)

    def forget(self) -> None:
        """Take the study away."""
        self._path.unlink(missing_ok=True)

    def _asked(self, wanted: int) -> dict[int, FrozenTrial]:
        trials = self.all()
        first = {_values(trial): trial.number for trial in reversed(trials) if JOB in trial.user_attrs}
        job = 1 + max((trial.user_attrs.get(JOB, -1) for trial in trials), default=-1)
        self.study.sampler = self._options.make_sampler(self._space, len(trials))
        new: list[int] = []
        for _ in range(wanted):
            trial = self.study.ask(self._distributions)
            twin = first.setdefault(_values(trial), trial.number)
            if twin == trial.number:
                trial.set_user_attr(JOB, job + len(new))
                new.append(trial.number)
            else:
                trial.set_user_attr(TWIN, twin)
        now = self.all()
        return {now[number].user_attrs[JOB]: now[number] for number in new}

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(self.study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _check_is_same(self, described: dict[str, Any]) -> None:
        before = self.study.user_attrs.setdefault("search", described)
        if before != described:
            wrong = [
                f"{key} was {before.get(key)}, is {now}" for key, now in described.items() if before.get(key) != now
            ]
            raise LoraConfigError(
                f"{self._path.parent} is the folder of another search:"
                + "".join(f"\n  - {each}" for each in wrong)
                + "\nName another folder with hydra.sweep.dir, or delete this one if its results are not needed"
            )
        self.study.set_user_attr("search", described)


def named(trial: FrozenTrial) -> str:
    """A trial in words: its job, if it had one, and its values."""
    job = trial.user_attrs.get(JOB)
    return (f"trial {trial.number}" if job is None else f"job {job}") + f": {in_short(trial.params.items())}"


def in_short(values: Iterable[tuple[str, Any]]) -> str:
    """Keys and values as one reads them."""
    return " ".join(f"{key.lstrip('+')}={f'{each:.6g}' if isinstance(each, float) else each}" for key, each in values)


def _distribution(values: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choices):
        return CategoricalDistribution(values.texts)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _values(trial: Trial | FrozenTrial) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(trial.params.items()))


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
