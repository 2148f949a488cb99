"""Checks what was typed before Hydra runs: unknown keys and choices, values that no LoRA config can have.

Hydra's own advice for an unknown key is to add it with a plus sign, which a misspelt setting is lost by.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.cli.candidates import Candidates
from lora_lightning.cli.clusters import missing_for
from lora_lightning.cli.told import CommandError
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError


class Problem(NamedTuple):
    """Something wrong with one argument, and the argument as it should be where that is known."""

    argument: str
    message: str
    correction: str | None = None


def check_command(argv: Sequence[str], config_name: str, *, command: str | None = None) -> None:
    """Refuse a command that cannot work, telling everything that is wrong with it.

    Hydra's flags stay Hydra's. Where they change which configuration is read, or only ask for help, nothing is checked.

    Args:
        argv: The program and its arguments, as in ``sys.argv``.
        config_name: The primary configuration.
        command: How the program is called, where ``argv[0]`` does not say it.

    Raises:
        CommandError: Something is wrong; with the corrected command where every correction is known.
    """
    args = get_args_parser().parse_args(list(argv[1:]))
    elsewhere = (args.config_path, args.config_name, args.config_dir, args.experimental_rerun)
    if any(elsewhere) or args.help or args.hydra_help or args.shell_completion:
        return
    # hydra.main has not run yet, and a caller's own Hydra is left as it is.
    with GlobalHydraKept(), initialize_config_module("lora_lightning.conf", version_base="1.3"):
        try:
            overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(args.overrides)
        except OverrideParseException as error:
            raise CommandError(
                f"{error}\n(in a shell, a value with brackets or blanks needs quotes: 'key=[a, b]')"
            ) from None
        problems = _problems(overrides, config_name, runs=args.cfg is None and args.info is None)
    if problems:
        raise CommandError(_message(problems), _corrected(argv, problems, command))


class GlobalHydraKept:
    """A context in which Hydra may be initialised anew."""

    def __enter__(self) -> None:
        """Put the state of Hydra aside."""
        self._hydra = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()

    def __exit__(self, *exception: object) -> None:
        """Bring it back."""
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = self._hydra


def _problems(overrides: list[Override], config_name: str, *, runs: bool) -> list[Problem]:
    groups = _Groups(config_name)
    problems = [problem for each in overrides if (problem := groups.check(each)) is not None]
    wrong = {problem.argument for problem in problems}
    chosen = [each for each in overrides if groups.has(each) and each.input_line not in wrong]
    base = _compose(config_name, chosen)
    if base is None:
        return problems  # the combination of groups is wrong: Hydra says how
    candidates = Candidates(base, groups.names)
    for each in overrides:
        if not groups.has(each) and (problem := _check_key(each, candidates)) is not None:
            problems.append(problem)
    problems += [_no_values(each) for each in overrides if _is_empty(each)]
    problems += [problem for each in overrides if (problem := _check_launcher(each)) is not None]
    wrong = {problem.argument for problem in problems}
    right = [each for each in overrides if each.input_line not in wrong]
    config = _compose(config_name, right)
    if config is None:
        return problems
    return problems + _check_values(config, runs) + _check_swept(config, right)


class _Groups:
    """The config groups and their choices.

    Args:
        config_name: The primary configuration.
    """

    def __init__(self, config_name: str) -> None:
        self._config_name = config_name
        self._loader = GlobalHydra.instance().config_loader()
        self.names = [name for name in self._loader.list_groups("") if name != "hydra"]

    def has(self, override: Override) -> bool:
        return override.key_or_group in self.names

    def check(self, override: Override) -> Problem | None:
        if not self.has(override):
            return None
        group, line = override.key_or_group, override.input_line or ""
        choices = [name for name in self._loader.get_group_options(group) if not name.startswith("_")]
        if override.is_delete():
            return self._left_out(group, line, choices)
        sweep = override.is_sweep_override()
        if sweep and not override.is_discrete_sweep():
            return Problem(line, f"{group} is chosen by name, and {line} gives a range of numbers")
        values = override.sweep_iterator() if sweep else [override.value()]
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        for value in flat:
            if value is None:
                tilde = Problem(line, f"a group is left out with a tilde: ~{group}", None if sweep else f"~{group}")
                return self._left_out(group, line, choices) or tilde
            if str(value) not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                message = f"{group} has no choice {str(value)!r}{hint}; there are {', '.join(choices)}"
                return Problem(line, message, line.replace(str(value), near[0]) if near else None)
        return None

    def _left_out(self, group: str, line: str, choices: list[str]) -> Problem | None:
        """What is wrong with leaving a group out; nothing where it only sets keys of others."""
        whole = _compose(self._config_name, [])
        if whole is None or group not in whole:
            return None
        return Problem(line, f"{line}: {group} cannot be left out, every run reads it; there are {', '.join(choices)}")


def _check_launcher(override: Override) -> Problem | None:
    if override.key_or_group != "hydra/launcher" or override.is_delete():
        return None
    missing = missing_for(str(override.value()))
    return None if missing is None else Problem(override.input_line or "", missing)


def _check_key(override: Override, candidates: Candidates) -> Problem | None:
    if override.is_hydra_override() or override.is_add() or override.is_force_add() or override.is_delete():
        return None
    key = override.key_or_group
    if override.package is not None or key in candidates:
        return None
    found = candidates.nearest(key)
    line = override.input_line or ""
    value = line[line.index("=") :]
    if found is not None:
        return Problem(line, f"unknown key {key!r} (did you mean {found}?)", f"{found}{value}")
    if candidates.open_for(key):
        return Problem(line, f"{key!r} is not set yet: a key is added with a plus sign, +{key}{value}", f"+{line}")
    parent = candidates.parent_of(key)
    where = f"{parent} has the keys" if parent else "the first part of a key is one of"
    return Problem(line, f"unknown key {key!r}; {where} {', '.join(candidates.children(parent))}")


def _compose(config_name: str, overrides: Iterable[Override]) -> DictConfig | None:
    """The configuration, or None where Hydra refuses; of a sweep, the first of its values."""
    lines = []
    for each in overrides:
        if each.is_hydra_override() or (each.is_sweep_override() and not each.is_discrete_sweep()):
            continue
        if each.is_sweep_override():
            first = next(iter(each.sweep_string_iterator()))
            lines.append(f"{each.get_key_element()}={first}")
        else:
            lines.append(each.input_line or "")
    try:
        return compose(config_name, overrides=lines)
    except (HydraException, OmegaConfBaseException):
        return None


def _is_empty(override: Override) -> bool:
    discrete = override.is_sweep_override() and override.is_discrete_sweep()
    return discrete and next(iter(override.sweep_string_iterator()), None) is None


def _no_values(override: Override) -> Problem:
    line = override.input_line or ""
    return Problem(line, f"{line} gives {override.key_or_group} no values, so that the grid has no jobs")


def _check_values(config: DictConfig, runs: bool) -> list[Problem]:
    problems = _check_lora(config)
    if runs:
        problems += [Problem("", f"{key} has no value yet: add {key}=…") for key in Candidates(config, ()).missing()]
    return problems


def _check_swept(config: DictConfig, overrides: Iterable[Override]) -> list[Problem]:
    """Try the further values of each swept key of ``lora``, with the first ones of the others.

    Every job as a whole is checked by the launcher before the first one starts: composing each here would take seconds.
    """
    known = {problem.message for problem in _check_lora(config)}
    problems = []
    for each in overrides:
        if each.key_or_group.startswith("lora.") and each.is_sweep_override() and each.is_discrete_sweep():
            for value in list(each.sweep_iterator())[1:]:
                tried = config.copy()
                OmegaConf.update(tried, each.key_or_group, value)
                new = [problem for problem in _check_lora(tried) if problem.message not in known]
                known |= {problem.message for problem in new}
                problems += new
    return problems


def _check_lora(config: DictConfig) -> list[Problem]:
    try:
        LoraConfig.from_dict(OmegaConf.to_container(config.lora, resolve=True))  # type: ignore[arg-type]
    except LoraConfigError as error:
        lines = str(error).split("\n  - ")
        return [Problem("", f"lora: {line}") for line in (lines[1:] or lines)]
    except OmegaConfBaseException as error:
        return [Problem("", f"lora: {error}")]
    return []


def _message(problems: list[Problem]) -> str:
    if len(problems) == 1:
        return problems[0].message
    return "These settings cannot be used:" + "".join(f"\n  - {problem.message}" for problem in problems)


def _corrected(argv: Sequence[str], problems: list[Problem], command: str | None) -> str | None:
    """The whole command with all corrections, or None where one is not known."""
    corrections = {problem.argument: problem.correction for problem in problems}
    if any(correction is None for correction in corrections.values()):
        return None
    words = [corrections.get(word) or word for word in argv[1:]]
    return " ".join([command or program(argv[0]), *(shlex.quote(word) for word in words)])


def program(path: str) -> str:
    """How a script is called from where one stands.

    >>> program("scripts/train.py")
    'python scripts/train.py'
    >>> program(__file__)
    'python -m lora_lightning.cli.overrides'
    """
    package = Path(__file__).parents[1]
    if Path(path).resolve().is_relative_to(package):
        module = Path(path).resolve().relative_to(package.parent).with_suffix("")
        return f"python -m {'.'.join(module.parts)}"
    here = os.path.relpath(path)
    shown = here if not here.startswith("..") else path
    return f"python {shlex.quote(shown)}" if Path(path).suffix == ".py" else shlex.quote(shown)
