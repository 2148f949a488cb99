"""The model, data and task that a run was made with, for commands that look at what it has left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

_GROUPS = ("model", "data", "task")


def as_trained(cfg: DictConfig, run: Path | None, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Take what nobody has chosen from the run's own settings.

    Args:
        cfg: The composed configuration.
        run: The run's folder; None, or one without ``config.yaml``, changes nothing.
        overrides: What was typed. A group that is chosen there, alone or by an experiment, stays as it was composed;
            single keys go on top of the run's.

    Returns:
        The configuration, and the groups that are the run's.
    """
    file = None if run is None else run / "config.yaml"
    if file is None or not file.is_file():
        return cfg, []
    earlier: Any = OmegaConf.load(file)
    typed = OverridesParser.create().parse_overrides(list(overrides))
    chosen = {override.key_or_group for override in typed}
    taken = [] if "experiment" in chosen else [name for name in _GROUPS if name not in chosen and name in earlier]
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    for name in taken:
        given = {key: OmegaConf.select(cfg, key) for key in chosen if key.startswith(f"{name}.")}
        cfg[name] = earlier[name]
        for key, value in given.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    return cfg, taken
