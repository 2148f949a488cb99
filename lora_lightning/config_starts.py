"""Settings of the starts that have some: which there are, what they mean unless given, and what is wrong with them.

Names, meanings and defaults are PEFT's; ``batches`` is our own: how many batches a start that looks at data is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_lightning.config_checks import check_choice, check_number, check_rank, check_switch
from lora_lightning.errors import did_you_mean

PISSA_NITER = re.compile(r"pissa_niter_(\d+)")
"""PiSSA by a fast singular value decomposition of so many iterations."""
DATA_DRIVEN = ("eva", "corda", "lora_ga")
"""Starts that are made from what batches of data show."""
_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
_DIVIDING = {"pissa": "above 0", "corda": "above 0", "loftq": "other than 0", "lora_ga": "other than 0"}
"""Starts that divide by the scale, and what it must be: the first two take its root as well."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "loftq": {"loftq_bits": 4, "loftq_iter": 1},
    "eva": {
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
        "batches": 100,
    },
    "corda": {
        "cache_file": None,
        "covariance_file": None,
        "corda_method": "ipm",
        "verbose": False,
        "use_float16_for_covariance": False,
        "prune_temporary_fields": True,
        "batches": 64,
    },
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16, "batches": 16},
}
OWN = ("batches",)
"""Settings that PEFT does not know: left out of its files."""


def start_of(init_lora_weights: bool | str) -> bool | str:
    """The name of a start, without the number of iterations in it.

    >>> start_of("pissa_niter_16"), start_of(True)
    ('pissa', True)
    """
    return "pissa" if PISSA_NITER.fullmatch(str(init_lora_weights)) else init_lora_weights


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether a start changes the weights of adapted layers."""
    return start_of(init_lora_weights) in _CHANGING


def settings_of(config: Any) -> dict[str, Any]:
    """All settings of a config's start, given ones and defaults; empty for a start that has none."""
    start = str(start_of(config.init_lora_weights))
    return DEFAULTS.get(start, {}) | (getattr(config, f"{start}_config", None) or {})


def idle_settings(config: Any) -> str | None:
    """The name of a field with settings of another start than a config's."""
    start = start_of(config.init_lora_weights)
    return next((f"{each}_config" for each in DEFAULTS if each != start and getattr(config, f"{each}_config")), None)


def check_settings(start: str, given: Any) -> list[str]:
    """What is wrong with the settings of one start, a line each."""
    name, known = f"{start}_config", DEFAULTS[start]
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"{name} must be a mapping of settings, got {given!r}"]
    problems = [f"{name} has no setting {key!r}{did_you_mean(str(key), known)}" for key in given if key not in known]
    for key, value in given.items():
        if key in _CHECKS:
            problems += _CHECKS[key](f"{name}.{key}", value)
        elif isinstance(known.get(key), bool):
            problems += check_switch(f"{name}.{key}", value)
    return problems


def check_start(config: Any) -> list[str]:
    """What does not go together in a config with its start, a line each."""
    how, start = config.init_lora_weights, start_of(config.init_lora_weights)
    problems = []
    if config.lora_bias and not isinstance(how, bool):
        problems.append(f"lora_bias goes with init_lora_weights=true or false only, got {how!r}")
    if start == "mica" and config.use_dora:
        problems.append("init_lora_weights='mica' keeps B as it is, which DoRA does not allow: use_dora=False")
    if start == "mica" and config.alora_invocation_tokens:
        problems.append("init_lora_weights='mica' does not go with alora_invocation_tokens")
    if changes_base(how) and config.alora_invocation_tokens:
        problems.append(
            f"init_lora_weights={how!r} changes the base's weights, but with alora_invocation_tokens the base is to "
            "act alone before those tokens"
        )
    if needed := _DIVIDING.get(str(start)):
        alphas = {"lora_alpha": config.lora_alpha}
        if isinstance(config.alpha_pattern, Mapping):
            alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in config.alpha_pattern.items()}
        problems += [
            f"init_lora_weights={how!r} divides by the scale, so that {name} must be {needed}, got {alpha!r}"
            for name, alpha in alphas.items()
            if not check_number(name, alpha) and (alpha == 0 or (alpha < 0 and needed == "above 0"))
        ]
    if changes_base(how) and config.target_parameters:
        problems.append(f"init_lora_weights={how!r} needs layers, and target_parameters are none")
    return problems


def _at_least(least: float, most: float = float("inf")) -> Callable[[str, Any], list[str]]:
    def check(name: str, value: Any) -> list[str]:
        if wrong := check_number(name, value):
            return wrong
        bounds = f"at least {least:g}" if most == float("inf") else f"between {least:g} and {most:g}"
        return [] if least <= value <= most else [f"{name} must be {bounds}, got {value!r}"]

    return check


def _one_of(*choices: str) -> Callable[[str, Any], list[str]]:
    return lambda name, value: check_choice(name, value, choices)


def _no_file(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"{name} is not written or read here (PEFT's is a pickle): leave it out"]


def _whole(name: str, value: Any) -> list[str]:
    good = isinstance(value, int) and not isinstance(value, bool)
    return [] if good else [f"{name} must be a whole number, got {value!r}"]


def _bits(name: str, value: Any) -> list[str]:
    return [] if value in (4, 8) else [f"{name} must be 4 or 8, got {value!r}"]


_CHECKS: dict[str, Callable[[str, Any], list[str]]] = {
    "rho": _at_least(1),
    "tau": _at_least(0, 1),
    "label_mask_value": _whole,
    "cache_file": _no_file,
    "covariance_file": _no_file,
    "corda_method": _one_of("ipm", "kpm"),
    "direction": _one_of("ArBr", "A2rBr", "ArB2r", "random"),
    "scale": _one_of("stable", "weight_svd", "gd_scale", "unit"),
    "stable_gamma": _at_least(1e-12),
    "loftq_bits": _bits,
    "loftq_iter": check_rank,
    "batches": check_rank,
}
