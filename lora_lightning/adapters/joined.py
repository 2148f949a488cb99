"""An adapter whose start has changed the base's weights, as one for the base that nobody has changed.

``W_res + s · B A = W + s · (B A − B₀ A₀) = W + s · [B, −B₀] [A; A₀]``: an adapter of twice the rank and the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.config_starts import DEFAULTS, OWN, changes_base, start_of
from lora_lightning.injection.starts.residual import START


def is_start(name: str) -> bool:
    """Whether a tensor of a state is a first value of another.

    >>> is_start("layers.0.q_proj.lora_A_start"), is_start("layers.0.q_proj.lora_A")
    (True, False)
    """
    return name.endswith((f"lora_A{START}", f"lora_B{START}"))


def with_starts(names: list[str], state: Mapping[str, Tensor]) -> list[str]:
    """Names, and those of their first values that a state has."""
    return [*names, *(name + START for name in names if name + START in state)]


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with ``[A; A₀]`` for ``A``, ``[B, −B₀]`` for ``B``, and no first values beside them."""
    found = {}
    for name, value in state.items():
        start = state.get(name + START)
        if start is not None:
            by_rows = name.endswith("lora_A")
            value = torch.cat([value, start if by_rows else -start], dim=0 if by_rows else 1)
        if not is_start(name):
            found[name] = value
    return found


def joined_config(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config of such an adapter: ranks doubled, and alphas so that every scale stays.

    PEFT refuses the conversion where rsLoRA and patterns meet; here ``alpha · √2 / √(2r)`` is the scale for each.
    Settings that PEFT has no place for are left out of every config.
    """
    start = start_of(values["init_lora_weights"])
    for name in ("eva_config", "corda_config", "lora_ga_config"):
        if values.get(name):
            values[name] = {key: value for key, value in values[name].items() if key not in OWN}
    if start == "loftq":  # whose base a reader has to round in the same way; PEFT wants to be told how
        return values | {"loftq_config": DEFAULTS["loftq"] | values["loftq_config"]}
    if not changes_base(start):
        return values
    more = math.sqrt(2) if values["use_rslora"] else 2
    doubled = {
        "r": 2 * values["r"],
        "lora_alpha": more * values["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in values["rank_pattern"].items()},
        "alpha_pattern": {key: more * alpha for key, alpha in values["alpha_pattern"].items()},
        "init_lora_weights": True,
        "corda_config": None,
        "lora_ga_config": None,
    }
    return values | doubled
