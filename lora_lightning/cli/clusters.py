"""Launchers for clusters, which come in packages of their own."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

# Of each launcher: the modules that it needs, and the extra of this package that brings them.
_NEEDS = {
    "ray": (("hydra_plugins.hydra_ray_launcher", "ray"), "ray"),
    "submitit_slurm": (("hydra_plugins.hydra_submitit_launcher", "submitit"), "slurm"),
    "submitit_local": (("hydra_plugins.hydra_submitit_launcher", "submitit"), "slurm"),
}


def missing_for(launcher: str) -> str | None:
    """What is to be installed for ``hydra/launcher=<launcher>``, in words; None where nothing is."""
    modules, extra = _NEEDS.get(launcher, ((), ""))
    if all(find_spec(module) is not None for module in modules):
        return None
    return (
        f"hydra/launcher={launcher} comes in a package that is not installed. Run: "
        f"pip install 'lora-lightning[{extra}]'"
    )


def quieten_hydra() -> None:
    """Drop a warning of Hydra's: our settings of such a launcher are meant to have its name, and it may check them."""
    message = r"\s*'hydra/launcher/(ray|submitit_slurm|submitit_local)' is validated against ConfigStore schema"
    warnings.filterwarnings("ignore", message=message)
