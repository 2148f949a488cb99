"""How to search with optuna: the keys of ``hydra.sweeper``, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.cli.search.space import Space
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.study import PRUNERS, SAMPLERS, made_of, need_optuna

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

_DIRECTIONS = {"min": "minimize", "max": "maximize", "minimize": "minimize", "maximize": "maximize"}
_APART = 1_000_003  # between the seeds of two batches, so that other searches' seeds, 0, 1, 2, do not meet them

# Their seed is that of a whole plan, and the study knows how far it has come.
_PLANNED = ("GridSampler", "QMCSampler")


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        n_trials: How many trials the study is to have.
        n_jobs: How many are launched together; None: as many as the launcher runs at once.
        direction: ``"min"`` or ``"max"``; a list where jobs return several values.
        sampler: A name of `SAMPLERS`, or a mapping with ``_target_``.
        pruner: A name of `PRUNERS`, a mapping with ``_target_``, or None: every trial trains to its end.
        monitor: Which metric of the validation pruning goes by.
        seed: Of the sampler; None: another one each time.
        params: More of the search space, key by key.
        fail_fast: Whether one failed trial ends the search.
    """

    n_trials: int = 20
    n_jobs: int | None = None
    direction: str | Sequence[str] = "min"
    sampler: str | Mapping[str, Any] = "tpe"
    pruner: str | Mapping[str, Any] | None = None
    monitor: str = "val_loss"
    seed: int | None = 0
    params: Mapping[str, Any] | None = None
    fail_fast: bool = False

    @property
    def directions(self) -> list[str]:
        """In optuna's words."""
        given = [self.direction] if isinstance(self.direction, str) else list(self.direction)
        if not given or not set(given) <= set(_DIRECTIONS):
            raise LoraConfigError(f"hydra.sweeper.direction is min or max, or a list of these, got {self.direction!r}")
        return [_DIRECTIONS[each] for each in given]

    @property
    def better(self) -> str | None:
        """``"min"`` or ``"max"``; None where jobs return several values."""
        return {"minimize": "min", "maximize": "max"}[self.directions[0]] if len(self.directions) == 1 else None

    def make_sampler(self, space: Space, before: int) -> BaseSampler:
        """A sampler for the next batch.

        Each batch has its own, with a seed of its own: a search that goes on draws what it would have drawn without a
        break, and not what it has drawn already.

        Args:
            space: What is searched.
            before: How many trials there are so far.
        """
        if self._target().endswith(_PLANNED):
            before = 0
        seed = None if self.seed is None else self.seed + _APART * before
        return made_of(self.sampler, SAMPLERS, seed=seed, **self._grid(space))

    def make_pruner(self) -> BasePruner | None:
        """What decides whether a trial is hopeless."""
        return None if self.pruner is None else made_of(self.pruner, PRUNERS)

    def check(self, space: Space) -> None:
        """Find what is wrong before anything runs.

        Raises:
            LoraConfigError: With everything that is, or optuna is not installed.
        """
        problems = []
        if not space.searched:
            problems.append(
                "There is nothing to search: give a key several values, as in lora.r=4,8,16 or "
                "'learning_rate=tag(log,interval(1e-4,1e-2))'"
            )
        for name in ("n_trials", "n_jobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                problems.append(f"hydra.sweeper.{name} is a number from 1 on, got {value!r}")
        if self.pruner is not None and len(self.directions) > 1:
            problems.append("Pruning goes by one value: leave hydra.sweeper.pruner out where jobs return several")
        if problems:
            raise LoraConfigError("\n".join(problems))
        need_optuna()
        self.make_sampler(space, 0)
        self.make_pruner()

    def _grid(self, space: Space) -> dict[str, Any]:
        """All values, for a sampler that goes through a grid."""
        if not self._target().endswith("GridSampler"):
            return {}
        values = {key: each.all() for key, each in space.searched.items()}
        if endless := [key for key, each in values.items() if each is None]:
            raise LoraConfigError(f"A grid needs values that can be counted, and {', '.join(endless)} has an interval")
        return {"search_space": {key: list(each or ()) for key, each in values.items()}}

    def _target(self) -> str:
        spec = SAMPLERS.get(self.sampler, {}) if isinstance(self.sampler, str) else self.sampler
        return str(spec.get("_target_"))
