"""A search in stages: grids one after the other, each with the best values of all before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from rich.console import Console

from lora_lightning.cli.search.run import SearchRun
from lora_lightning.cli.search.space import Space, parse_space, parsed_values, written
from lora_lightning.errors import LoraConfigError


@dataclass(frozen=True)
class Options:
    """How to search; the keys of ``hydra.sweeper``.

    Attributes:
        stages: Each a grid: for each key its values, as a list or in Hydra's words.
        hold: Keys that keep in all jobs what they are in the first configuration, though they follow others.
        direction: ``"min"`` or ``"max"``: which value is the better one.
        fail_fast: Whether one failed job ends the search.
    """

    stages: Sequence[Mapping[str, Any]]
    hold: Sequence[str] = ()
    direction: str = "min"
    fail_fast: bool = False


class Tried(NamedTuple):
    """A job that has been run.

    Attributes:
        number: Of the job.
        chosen: Its values of what the stages set, by key.
        value: What it returned; None where it failed.
        why: Why it failed.
    """

    number: int
    chosen: dict[str, str]
    value: float | None
    why: str = ""


def run_stages(run: SearchRun, options: Options, arguments: Sequence[str]) -> None:
    """Run the stages one after the other.

    Jobs are numbered through, and the same each time: started again in the same folder, a search whose launcher skips
    finished jobs goes on where it was.

    Args:
        run: Where it leaves its files, and what launches its jobs.
        options: How to search.
        arguments: Overrides of the command line. Several values take the place of those of the stage that sets this
            key; a single one is fixed, and the key left out of the stages.

    Raises:
        LoraConfigError: The settings are wrong, or no job of a stage came to its end.
    """
    if options.direction not in ("min", "max"):
        raise LoraConfigError(f"hydra.sweeper.direction is min or max, got {options.direction!r}")
    run.check_direction(options.direction)
    fixed, stages = _read(run, options, arguments)
    with run.begun():
        _Stages(run, options, fixed).run(stages)


class _Stages:
    def __init__(self, run: SearchRun, options: Options, fixed: Sequence[str]) -> None:
        self._run, self._options, self._fixed = run, options, list(fixed)
        self._console = Console()
        self._tried: list[Tried] = []
        self._known: dict[str, Tried] = {}  # by the whole configuration

    def run(self, stages: Sequence[dict[str, Sequence[str]]]) -> None:
        best: dict[str, str] = {}
        for number, stage in enumerate(stages, 1):
            grid = [dict(zip(stage, values, strict=True)) for values in itertools.product(*stage.values())]
            self._run_stage([best | values for values in grid])
            winner = self._best()
            best = dict(winner.chosen)
            self._say(f"Stage {number} of {len(stages)}: best {winner.value:.6g}, {_named(winner)}")
        texts = [f"{key}={value}" for key, value in best.items()]
        self._run.leave_results(name="stages", best_params=parsed_values(texts), best_value=self._best().value)

    def _run_stage(self, grid: Sequence[dict[str, str]]) -> None:
        """Run what has not been run yet: a grid may hold the best of those before, or a default that they had."""
        first = len(self._tried)
        new: dict[int, tuple[dict[str, str], str]] = {}
        for chosen in grid:
            number = first + len(new)
            whole = self._whole(number, self._overrides(chosen))
            if whole not in self._known and all(whole != other for _, other in new.values()):
                new[number] = (chosen, whole)
        if not new:
            return
        returns = self._run.launch({number: self._overrides(chosen) for number, (chosen, _) in new.items()})
        for number, (chosen, whole) in new.items():
            value, why = None, ""
            try:
                value, why = float(returns[number].return_value), ""
            except Exception as error:  # whatever the job has raised, or it returned no number
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._known[whole] = Tried(number, chosen, None if value is None or math.isnan(value) else value, why)
            self._tried.append(self._known[whole])
        failed = [each for each in self._tried[first:] if each.value is None]
        for each in failed:
            self._say(f"Failed: {_named(each)}: {each.why or 'its value is not a number'}")
        if failed and (self._options.fail_fast or len(failed) == len(new)):
            raise LoraConfigError(f"The search ends here: {len(failed)} of the {len(new)} jobs of this stage failed")

    def _best(self) -> Tried:
        sign = 1 if self._options.direction == "min" else -1
        return min(
            (each for each in self._tried if each.value is not None), key=lambda each: sign * (each.value or 0.0)
        )

    def _overrides(self, chosen: Mapping[str, str]) -> list[str]:
        return [*self._fixed, *(f"{key}={value}" for key, value in chosen.items())]

    def _whole(self, number: int, overrides: Sequence[str]) -> str:
        """The configuration of a job without what is Hydra's, by which two jobs are the same."""
        config = self._run.composed(number, overrides)
        return OmegaConf.to_yaml(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _read(
    run: SearchRun, options: Options, arguments: Sequence[str]
) -> tuple[list[str], list[dict[str, Sequence[str]]]]:
    """What is fixed in all jobs, and the grids of the stages, with what was typed in place of what they say."""
    typed = parse_space(arguments, None, run.loader)
    spaces = [parse_space((), stage, run.loader) for stage in options.stages]
    problems = []
    theirs = {_bare(key) for space in spaces for key in (*space.searched, *map(_key, space.fixed))}
    for key in typed.searched:
        if _bare(key) not in theirs:
            problems.append(f"{key} has several values, and no stage of hydra.sweeper.stages sets it")
    mine = {_bare(_key(line)) for line in typed.fixed}
    stages = []
    for space in spaces:
        stage = _grid(space, typed, problems)
        stage = {key: values for key, values in stage.items() if _bare(key) not in mine}
        if stage:
            stages.append(stage)
    if not stages:
        problems.append("there is no stage to run: hydra.sweeper.stages=[{key: [value, value]}, …]")
    held = _held(run, options, typed.fixed, problems)
    if problems:
        raise LoraConfigError("These stages cannot be run:" + "".join(f"\n  - {each}" for each in problems))
    return [*held, *typed.fixed], stages


def _grid(space: Space, typed: Space, problems: list[str]) -> dict[str, Sequence[str]]:
    """The values of a stage, written out; a single value is a grid of one."""
    grid: dict[str, Sequence[str]] = {_key(line): [line.partition("=")[2]] for line in space.fixed}
    for key, own in space.searched.items():
        values = next((each for other, each in typed.searched.items() if _bare(other) == _bare(key)), own)
        counted = values.all()
        if counted is None:
            problems.append(f"{key} has an interval; a stage is a grid and needs values that can be counted")
        grid[key] = [values.write(each) for each in counted or ()]
    return grid


def _held(run: SearchRun, options: Options, fixed: Sequence[str], problems: list[str]) -> list[str]:
    config = run.composed(0, fixed)
    mine = {_bare(_key(line)) for line in fixed}
    lines = []
    for key in options.hold:
        value = OmegaConf.select(config, key)
        if value is None:
            problems.append(f"hydra.sweeper.hold names {key}, which has no value")
        elif key not in mine:
            lines.append(f"{key}={written(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)}")
    return lines


def _key(line: str) -> str:
    return line.partition("=")[0]


def _bare(key: str) -> str:
    return key.lstrip("+~")


def _named(tried: Tried) -> str:
    return f"job {tried.number}: " + " ".join(f"{key.lstrip('+')}={value}" for key, value in tried.chosen.items())
