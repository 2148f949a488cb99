"""The study of a search: optuna's, in one file that the sweeper and its jobs write to and a search resumes from."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.reports.whole import write_whole
from lora_lightning.sweeps.runs import read_json

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STUDY = "study.journal"
"""File of the study, in the folder of the sweep."""
NOTE = "trial.json"
"""File in a job's folder by which it knows its trial."""
PRUNED = "pruned"
"""Attribute of a trial: the step at which its job has stopped."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"_target_": "optuna.samplers.TPESampler", "multivariate": True, "constant_liar": True},
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "grid": {"_target_": "optuna.samplers.GridSampler"},
}
PRUNERS: dict[str, dict[str, Any]] = {
    "median": {"_target_": "optuna.pruners.MedianPruner"},
    "hyperband": {"_target_": "optuna.pruners.HyperbandPruner"},
    "halving": {"_target_": "optuna.pruners.SuccessiveHalvingPruner"},
}


@dataclass(frozen=True)
class Note:
    """What a job has to know to report to its study.

    Attributes:
        study: The study's file; absolute.
        name: The study's name in it.
        trial: The number of the trial.
        monitor: Which metric of the validation is reported.
        pruner: What decides, as a name of `PRUNERS` or a mapping with ``_target_``.
    """

    study: str
    name: str
    trial: int
    monitor: str
    pruner: str | dict[str, Any]

    def write(self, folder: Path) -> None:
        """Leave it in a job's folder."""
        write_whole(folder / NOTE, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def remove(folder: Path) -> None:
        """Take it away, and the folder too where nothing else is in it."""
        (folder / NOTE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()

    @classmethod
    def read(cls, folder: Path) -> Note | None:
        """What lies in a job's folder; None where it is no trial, or none that may be pruned."""
        content = read_json(folder / NOTE)
        return None if content is None else cls(**content)


def need_optuna() -> None:
    """Make sure that optuna is there, and that it speaks of nothing that is not wrong.

    Raises:
        LoraConfigError: It is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise LoraConfigError("This search needs optuna: pip install 'lora-lightning[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


def open_storage(path: Path) -> BaseStorage:
    """The storage in a file, made if need be. Any number of processes may write to it at a time."""
    need_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def mend(path: Path) -> None:
    """Take away the end of a file whose last line was being written when the machine or the process ended.

    Every later reader would stumble over it.
    """
    if not path.exists():
        return
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # a job of the process that has ended may still be saving
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def made_of(what: Any, known: Mapping[str, Mapping[str, Any]], **more: Any) -> Any:
    """A sampler or a pruner, from its name or from a mapping with ``_target_`` and settings, nested ones too.

    Args:
        what: For example ``"median"``, or ``{"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 8}``.
        known: What the names stand for.
        **more: Settings for it where it has such and they are not given.

    Raises:
        LoraConfigError: There is no such thing, or it does not take these settings.
    """
    if isinstance(what, str) and what not in known:
        raise LoraConfigError(
            f"there is no {what!r}{did_you_mean(what, known)}: one of {', '.join(known)}, or a mapping with _target_"
        )
    spec = dict(known[what] if isinstance(what, str) else what)
    try:
        module, _, name = str(spec.pop("_target_")).rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        settings = {key: made_of(each, {}) if _is_spec(each) else each for key, each in spec.items()}
        takes = inspect.signature(kind).parameters
        return kind(**{key: value for key, value in more.items() if key in takes} | settings)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise LoraConfigError(f"{what} cannot be made: {type(error).__name__}: {error}") from error


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value
