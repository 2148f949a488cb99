"""A search by optuna: ask for trials, launch them, tell what came of them, until there are as many as were wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from optuna.trial import FrozenTrial
from rich.console import Console

from lora_lightning.cli.search.options import Options
from lora_lightning.cli.search.run import SearchRun
from lora_lightning.cli.search.space import Space, parse_space, parsed_values
from lora_lightning.cli.search.trials import FAILED, TWIN, Trials, named
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.manifest import NAME as MANIFEST
from lora_lightning.sweeps.study import Note

_HOPE = 3  # so many trials may fail at the start before the search is given up
_ATTEMPTS = 3  # of a trial whose job is told to end from outside
_ENDED = ("COMPLETE", "PRUNED", "FAIL")


def search(run: SearchRun, options: Options, arguments: Sequence[str]) -> None:
    """Search, or go on with the search in the folder.

    Raises:
        LoraConfigError: The settings are wrong, the folder holds another search, or no trial comes to an end.
    """
    space = parse_space(arguments, options.params, run.loader)
    options.check(space)
    if options.better is not None:
        run.check_direction(options.better)
    with run.begun():
        OptunaSearch(run, options, space).run()


class OptunaSearch:
    """One search in its folder.

    Args:
        run: Where it leaves its files, and what launches its jobs.
        options: How to search.
        space: What to search.
    """

    def __init__(self, run: SearchRun, options: Options, space: Space) -> None:
        self._run, self._options, self._space = run, options, space
        self._trials = Trials(run.folder, space, options)
        self._broken_off: Counter[int] = Counter()  # by trial: how often its job has not come to its end
        self._console = Console()
        at_once = options.n_jobs or run.jobs_at_once()
        self._at_once = at_once or 1
        if at_once is None:
            self._say(
                "One trial at a time: this launcher does not say how many jobs it runs at once. "
                "For more: hydra.sweeper.n_jobs=…"
            )

    def run(self) -> None:
        """Run trials until there are as many as are wanted, and leave what was best."""
        while jobs := self._trials.left_running() or self._trials.ask(self._at_once):
            self._run_jobs(jobs)
            self._say(self._counts())
            self._check_hope()
        self._conclude()

    def _run_jobs(self, jobs: Mapping[int, FrozenTrial]) -> None:
        """Run trials, by the number of their job, and tell the study what came of each."""
        overrides = {number: self._overrides(trial) for number, trial in jobs.items()}
        noted = self._note(jobs, overrides)
        try:
            returns = self._run.launch(overrides)
        except (LoraConfigError, SystemExit):
            # Refused, or only listed: the corrected command begins anew in the same folder.
            if not (self._run.folder / MANIFEST).exists() and not self._trials.all(*_ENDED):
                self._trials.forget()
                for folder in noted:
                    Note.remove(folder)
            raise
        for number, trial in jobs.items():
            self._tell(trial.number, returns[number])

    def _note(self, jobs: Mapping[int, FrozenTrial], overrides: Mapping[int, Sequence[str]]) -> list[Path]:
        """Let each job that may be pruned know its trial; one that may be no more is told nothing."""
        pruner, folders = self._options.pruner, []
        for number, trial in jobs.items():
            folders.append(self._run.folder_of(number, overrides[number]))
            if pruner is None:
                Note.remove(folders[-1])
            else:
                self._trials.note(trial.number, self._options.monitor, pruner).write(folders[-1])
        return folders

    def _tell(self, trial: int, returned: JobReturn) -> None:
        try:
            value = returned.return_value
        except Exception as error:  # whatever the job has raised
            self._broken_off[trial] += 1
            if getattr(error, "state", "failed") != "failed" and self._broken_off[trial] < _ATTEMPTS:
                return  # it was told to end, or never began: it stays among the running, and is run again
            self._trials.fail(trial, (str(error).strip().splitlines() or [type(error).__name__])[0])
        else:
            self._trials.tell(trial, value)

    def _overrides(self, trial: FrozenTrial) -> list[str]:
        return [*self._space.fixed, *self._texts(trial)]

    def _texts(self, trial: FrozenTrial) -> list[str]:
        return [f"{key}={values.write(trial.params[key])}" for key, values in self._space.searched.items()]

    # What to say of it

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _counts(self) -> str:
        words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        counts = {word: len(self._trials.all(state)) for state, word in words.items()}
        best = self._trials.best()
        so_far = (
            f". Best so far {best[0].value:.6g}, {named(best[0])}"
            if len(best) == 1 and best[0].values[1:] == []
            else ""
        )
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"Of {self._options.n_trials} trials {told}{so_far}"

    def _check_hope(self) -> None:
        """End the search where going on is of no use.

        Raises:
            LoraConfigError: With what the trials have failed of.
        """
        failed = self._trials.all("FAIL")
        none_good = not self._trials.all("COMPLETE", "PRUNED") and len(failed) >= max(_HOPE, self._at_once)
        if failed and (none_good or self._options.fail_fast):
            raise LoraConfigError(f"The search ends here. {self._failures(failed)}")

    def _conclude(self) -> None:
        best, failed = self._trials.best(), self._trials.all("FAIL")
        if repeated := [trial for trial in self._trials.all() if TWIN in trial.user_attrs]:
            self._say(f"{len(repeated)} repeated earlier trials and took their values")
        if not best:
            raise LoraConfigError(f"No trial came to its end. {self._failures(failed)}")
        if failed:
            self._say(self._failures(failed))
        params = [parsed_values(self._texts(trial)) for trial in best]
        if len(self._trials.study.directions) == 1:
            self._run.leave_results(name="optuna", best_params=params[0], best_value=best[0].value)
            self._say(f"Best {best[0].value:.6g}, {named(best[0])}")
            return
        found = [{"params": each, "values": list(trial.values)} for each, trial in zip(params, best, strict=True)]
        self._run.leave_results(name="optuna", solutions=found)
        for trial in best:
            self._say(
                f"Bettered in all values by none: {', '.join(f'{each:.6g}' for each in trial.values)}, {named(trial)}"
            )

    @staticmethod
    def _failures(failed: Sequence[FrozenTrial]) -> str:
        if not failed:
            return "All were pruned"
        shown = "".join(f"\n  - {named(trial)}: {trial.user_attrs.get(FAILED)}" for trial in failed[-5:])
        return f"{len(failed)} {'trial' if len(failed) == 1 else 'trials'} failed, the last of them:{shown}"
