"""Which adapter a command line means: an adapter folder, the folder of a run, or one on the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from lora_lightning.errors import AdapterError, LoraConfigError, did_you_mean

_CONFIG = "adapter_config.json"
_RUN_CONFIG = "config.yaml"
_BEST = "best.json"  # beside the adapter that a sweep's report has copied
_DEPTH = 4
_MOST = 8


class Which(NamedTuple):
    """What was meant.

    Attributes:
        adapter: An adapter folder, or ``owner/name[@revision]`` on the Hub.
        run: The folder of the run that left it, where it lies in one.
    """

    adapter: str
    run: Path | None


def which_adapter(place: str | os.PathLike[str]) -> Which:
    """Find the adapter in what was typed.

    Args:
        place: An adapter folder; the folder of a run, whose ``adapter/`` is taken; or ``owner/name[@revision]``.

    Raises:
        AdapterError: If there is no adapter, or there are several. What is there is named, with the adapters below it.
    """
    folder = Path(place)
    if not folder.exists():
        if _may_be_on_the_hub(place):
            return Which(os.fspath(place), None)
        hub = f"; the adapter of that name on the Hub is {folder}@main" if _is_name(place) else ""
        raise AdapterError(f"there is no folder {folder}{_near(folder)}{hub}")
    if folder.is_file():
        raise AdapterError(f"{folder} is a file, and an adapter is a folder that holds {_CONFIG}{_of_file(folder)}")
    if (folder / _CONFIG).is_file():
        return Which(str(folder), run_around(folder))
    inside = [folder / "adapter", *sorted((folder / "adapter").glob("*/"))]
    found = [each for each in inside if (each / _CONFIG).is_file()]
    if len(found) == 1:
        return Which(str(found[0]), folder if _is_run(folder) else None)
    raise AdapterError(_nothing_in(folder, found))


def run_around(folder: Path) -> Path | None:
    """The folder of the run that an adapter folder lies in: as ``adapter``, ``adapter/NAME`` or below ``checkpoints``.

    Of a sweep's ``best/`` it is that of the best job. None where it lies in none.
    """
    origin = origin_of(folder).absolute()
    return next((each for each in (origin.parent, origin.parent.parent) if _is_run(each)), None)


def origin_of(folder: Path) -> Path:
    """The job's own adapter folder where this one is a sweep's ``best/``, a copy of it; else the same folder."""
    try:
        told = json.loads((folder / _BEST).read_text(encoding="utf-8"))["adapter"]
        return folder.absolute().parent / told
    except (OSError, ValueError, TypeError, KeyError):
        return folder


def run_named(folder: Path) -> Path:
    """The folder of a run that was named as such.

    Raises:
        LoraConfigError: It is none; with the nearest.
    """
    if _is_run(folder):
        return folder
    if not folder.is_dir():
        raise LoraConfigError(f"there is no folder {folder}{_near(folder)}")
    around = run_around(folder)
    raise LoraConfigError(
        f"{folder} is not the folder of a run: there is no {_RUN_CONFIG} with the settings of a training here (lora, "
        f"model, data, task)" + (f". It lies in one: {around}" if around else "")
    )


def _is_run(folder: Path) -> bool:
    """Whether a training of ours left its settings here. Others have a ``config.yaml`` too, as LightningCLI."""
    try:
        config = yaml.safe_load((folder / _RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    parts = [config.get(part) for part in ("lora", "model", "data", "task")] if isinstance(config, dict) else [None]
    return all(isinstance(part, dict) for part in parts) and "name" in config["model"] and "_target_" in config["task"]


def _may_be_on_the_hub(place: str | os.PathLike[str]) -> bool:
    """Whether it has the form of a name there. Below a folder that is here, it has to say a revision too."""
    return _is_name(place) and ("@" in os.fspath(place) or not Path(place).parent.is_dir())


def _is_name(place: str | os.PathLike[str]) -> bool:
    text = os.fspath(place)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def _near(folder: Path) -> str:
    """The nearest name beside a folder that is not there, or the last one on the way to it that is."""
    parent = folder.absolute().parent
    if parent.is_dir():
        return did_you_mean(folder.name, [each.name for each in parent.iterdir() if each.is_dir()])
    while not parent.is_dir():
        parent = parent.parent
    return f"; there is {parent}, which holds {_listed(sorted(each.name for each in parent.iterdir()))}"


def _of_file(file: Path) -> str:
    if file.suffix == ".ckpt":
        return f". To make one of this checkpoint: lora-lightning to-adapter {file}"
    if (file.parent / _CONFIG).is_file():
        return f": give {file.parent}"
    return ""


def _nothing_in(folder: Path, several: list[Path]) -> str:
    candidates = several or list(_below(folder, _DEPTH))
    if candidates:
        newest = sorted(candidates, key=lambda each: (each / _CONFIG).stat().st_mtime, reverse=True)
        lines = "".join(f"\n  - {each}" for each in newest[:_MOST])
        more = f"\n  and {len(newest) - _MOST} more" if newest[_MOST:] else ""
        what = "holds several adapters" if several else f"is not an adapter folder (no {_CONFIG}), but there are some"
        return f"{folder} {what}; name one of them, the newest first:{lines}{more}"
    there = _listed(sorted(each.name for each in folder.iterdir()))
    checkpoints = [each for pattern in ("*.ckpt", "checkpoints/*.ckpt") for each in sorted(folder.glob(pattern))]
    hint = f". To make one of a checkpoint: lora-lightning to-adapter {checkpoints[-1]}" if checkpoints else ""
    return f"there is no adapter in {folder}: no {_CONFIG} in it or below it (it holds {there}){hint}"


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for each in sorted(folder.iterdir()):
        if not each.is_dir() or each.name.startswith("."):
            continue
        if (each / _CONFIG).is_file():
            yield each
        if depth > 1:
            yield from _below(each, depth - 1)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if names[_MOST:] else ""
    return (", ".join(names[:_MOST]) or "nothing") + more
