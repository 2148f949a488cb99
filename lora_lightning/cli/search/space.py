"""What is searched: from settings in Hydra's words to dimensions, each of which can write a value of its own again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException

from lora_lightning.cli.sweep.compose import own_overrides
from lora_lightning.errors import LoraConfigError

TAGS = frozenset({"log"})
_PLAIN = re.compile(r"[A-Za-z_][\w.\-/]*")
_WORDS_OF_YAML = frozenset({"true", "false", "null", "nan", "inf"})


@dataclass(frozen=True)
class Choices:
    """Values without an order among them: ``choice(4,8)``, ``4,8``, ``glob(*)``.

    Attributes:
        texts: Each as it is written in an override.
    """

    texts: tuple[str, ...]

    def write(self, value: Any) -> str:
        """A value as it is written in an override."""
        return str(value)

    def all(self) -> tuple[str, ...]:
        """Every value there is."""
        return self.texts


@dataclass(frozen=True)
class Numbers:
    """Numbers from ``low`` to ``high``, both included: ``interval(1e-4,1e-2)``, ``range(1,9)``.

    Attributes:
        low: The smallest.
        high: The largest.
        step: The distance between neighbours; None where every number between is meant.
        log: Whether what counts is the ratio of two numbers and not their difference.
        whole: Whether they are integers.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def write(self, value: Any) -> str:
        """A value as it is written in an override, without loss."""
        return str(int(value)) if self.whole else repr(float(value))

    def all(self) -> tuple[float, ...] | None:
        """Every value there is, or None where they cannot be counted."""
        step = self.step or (1 if self.whole else None)
        if step is None:
            return None
        return tuple(float(f"{self.low + i * step:.12g}") for i in range(1 + round((self.high - self.low) / step)))


Dimension: TypeAlias = Choices | Numbers


class Space(NamedTuple):
    """What a search may set, and what it leaves as it is.

    Attributes:
        fixed: Overrides of every job, as they were typed.
        searched: For each key, with its plus sign if it has one, the values to choose from.
    """

    fixed: tuple[str, ...]
    searched: dict[str, Dimension]

    def size(self) -> float:
        """How many combinations there are; infinite where numbers of an interval cannot be counted."""
        counted = [values.all() for values in self.searched.values()]
        return math.prod(math.inf if values is None else len(values) for values in counted)

    def described(self) -> dict[str, Any]:
        """The same as plain values, to compare one search with another: where jobs run is no part of it."""
        return {
            "fixed": list(own_overrides(self.fixed)),
            "searched": {key: repr(values) for key, values in self.searched.items()},
        }


def parse_space(
    arguments: Sequence[str], params: Mapping[str, Any] | None = None, loader: ConfigLoader | None = None
) -> Space:
    """Read a search space.

    Args:
        arguments: Overrides of the command line. One that has several values, ``lora.r=4,8``, ``choice(…)``,
            ``range(…)``, ``interval(…)`` or ``glob(…)``, is searched, ``tag(log,…)`` by ratios; any other is fixed.
        params: The same from a file, key by key; a list is a choice between its items. What is typed comes before it.
        loader: Hydra's, which knows the choices that a ``glob`` means.

    Raises:
        LoraConfigError: With everything that cannot be searched, and why.
    """
    lines = [f"{key}={written(value, as_choice=True)}" for key, value in (params or {}).items()]
    parser = OverridesParser.create(config_loader=loader)  # type: ignore[arg-type]  # None is what it takes as well
    fixed: dict[str, str] = {}
    searched: dict[str, Dimension] = {}
    problems: list[str] = []
    for line in [*lines, *arguments]:
        try:
            [override] = parser.parse_overrides([line])
            key = override.get_key_element()
            for earlier in [each for each in (*fixed, *searched) if each.lstrip("+~") == key.lstrip("+~")]:
                fixed.pop(earlier, None)
                searched.pop(earlier, None)
            if override.is_sweep_override():
                searched[key] = _dimension(override)
            else:
                fixed[key] = line
        except (HydraException, LoraConfigError) as error:
            problems.append(f"{line}: {error}")
    if problems:
        raise LoraConfigError("These settings cannot be searched:" + "".join(f"\n  - {each}" for each in problems))
    return Space(tuple(fixed.values()), searched)


def written(value: Any, *, as_choice: bool = False) -> str:
    """A value of a file as it is written in an override; a string is taken as it is where it may hold a choice.

    >>> written(None), written(True), written(1e-4), written("all-linear"), written(".*(attn|mlp)")
    ('null', 'true', '0.0001', 'all-linear', "'.*(attn|mlp)'")
    >>> written(["all-linear", ["q_proj", "v_proj"]], as_choice=True)
    'all-linear,[q_proj,v_proj]'
    >>> written("tag(log,interval(1e-4,1e-2))", as_choice=True)
    'tag(log,interval(1e-4,1e-2))'
    """
    if isinstance(value, str):
        plain = as_choice or (_PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML)
        return value if plain else QuotedString(text=value, quote=Quote.single).with_quotes()
    if isinstance(value, (list, tuple)):
        items = ",".join(written(each) for each in value)
        if not as_choice:
            return f"[{items}]"
        return items if len(value) > 1 else f"choice({items})"  # choice() does not take null, for one
    if isinstance(value, dict):
        return "{" + ",".join(f"{written(key)}:{written(each)}" for key, each in value.items()) + "}"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def parsed_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Single values of overrides as YAML has them, by their keys.

    >>> parsed_values(["+lora.r=8", "lora.target_modules=[q_proj,v_proj]"])
    {'lora.r': 8, 'lora.target_modules': ['q_proj', 'v_proj']}
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {each.get_key_element().lstrip("+"): each.value() for each in parsed}


def _dimension(override: Override) -> Dimension:
    value = override.value()
    tags = value.tags if isinstance(value, Sweep) else set()
    if unknown := tags - TAGS:
        raise LoraConfigError(f"there is no tag {', '.join(sorted(unknown))}; log is the only one")
    if override.is_choice_sweep():
        if tags:
            raise LoraConfigError("log is for numbers: tag(log,interval(low,high))")
        if isinstance(value, ChoiceSweep):
            value.shuffle = False  # the order means nothing to a search, and is to be the same when it goes on
        texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
        if not texts:
            raise LoraConfigError("there is nothing to choose from")
        return Choices(texts)
    if isinstance(value, RangeSweep):
        return _steps(value, log=bool(tags))
    assert isinstance(value, IntervalSweep)  # Hydra has no other
    return _interval(value, log=bool(tags))


def _steps(value: RangeSweep, *, log: bool) -> Dimension:
    """The numbers of a range, which ends before its stop as in a grid."""
    try:
        numbers = sorted(float(number) for number in value.range())
    except (HydraException, ValueError):  # a step of zero
        numbers = []
    if not numbers:
        raise LoraConfigError(f"no number lies in this range: from {value.start} to below {value.stop} by {value.step}")
    whole = all(isinstance(each, int) for each in (value.start, value.stop, value.step))
    if log and (not whole or abs(value.step) != 1):
        raise LoraConfigError("a range is searched by ratios in steps of 1 only; or name the numbers, as in 4,8,16")
    low, high = numbers[0], numbers[-1]
    _check_ends(low, high, log=log)
    return Numbers(low, high, step=None if log else abs(float(value.step)), log=log, whole=whole)


def _interval(value: IntervalSweep, *, log: bool) -> Dimension:
    ends = (value.start, value.end)
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end) for end in ends):
        raise LoraConfigError(f"the ends of an interval are two numbers, got {value.start} and {value.end}")
    low, high = (float(end) for end in ends if end is not None)
    _check_ends(low, high, log=log)
    return Numbers(low, high, log=log, whole=all(isinstance(end, int) for end in ends))


def _check_ends(low: float, high: float, *, log: bool) -> None:
    if low > high:
        raise LoraConfigError(f"the lower end comes first, got {low:g} before {high:g}")
    if log and low <= 0:
        raise LoraConfigError(f"ratios need numbers above zero, got {low:g}")
