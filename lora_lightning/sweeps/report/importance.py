"""Which settings mattered, as optuna's study of a search has it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.report.collect import Sweep
from lora_lightning.sweeps.report.sheet import new_sheet
from lora_lightning.sweeps.study import STUDY, open_storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 10  # finished trials; of fewer, an importance is chance


def importances(folder: Path) -> dict[str, float]:
    """How much of the metric's spread among good trials each setting makes, largest first; they sum to one.

    Reckoned by PED-ANOVA, which needs nothing but optuna.

    Returns:
        Nothing where there is no study, where it has fewer than `ENOUGH` finished trials, or where optuna is missing.
    """
    file = folder / STUDY
    if not file.is_file():
        return {}
    try:
        storage = open_storage(file)
    except LoraConfigError as error:
        warnings.warn(f"{file}: no importance of settings. {error}", stacklevel=2)
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    (name, *_) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    if len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < ENOUGH:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def importance_bars(sweep: Sweep) -> Figure | None:
    """Draw the importance of the settings as bars; None where it is not known."""
    found = importances(sweep.folder)
    if not found:
        return None
    figure, axes = new_sheet(7.2, 1.2 + 0.4 * len(found))
    names = list(reversed(found))
    bars = axes.barh(names, [found[name] for name in names], color="#4878b6")
    axes.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=8)
    axes.set_xlabel(f"share of the spread of {sweep.metric} (PED-ANOVA)")
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    return figure
