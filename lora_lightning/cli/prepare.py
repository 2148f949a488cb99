"""Everything that a training needs from elsewhere, had beforehand: ``lora-lightning prepare`` and the train command.

Afterwards the same training works where there is no network. Several processes may prepare the same at once: one does
the work, the others wait for it.

Light on purpose: a mistake is told before torch is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig, OmegaConf

from lora_lightning.cli.launch import launch
from lora_lightning.cli.told import CommandError, told

if TYPE_CHECKING:
    from lora_lightning.tasks import ModelConfig


class Prepared(NamedTuple):
    """What was made ready: its name, where it lies (None: nowhere), and what is to be said of it."""

    what: str
    place: Path | None
    remark: str = ""

    def __str__(self) -> str:
        size = "" if self.place is None else f"{self.place} ({_size(self.place)})"
        return ": ".join(part for part in (self.what, size, self.remark) if part)


def main(command: str | None = None) -> None:
    """Prepare what a training with these settings needs; ``command`` is how this program was called."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        with told():
            raise CommandError(
                "prepare takes the settings of one run. A sweep prepares what its jobs need by itself, before the "
                "first one starts; to have it done beforehand, prepare each model and data set with a command of its "
                "own, without -m"
            )
    launch("prepare", _prepare, command=command)


def _prepare(cfg: DictConfig) -> None:
    for prepared in prepare(cfg):
        print(prepared)
    print("Ready. The same settings train without a network now (HF_HUB_OFFLINE=1).")


def prepare(cfg: DictConfig) -> list[Prepared]:
    """Have the model's files and the rows of a configuration on this machine.

    Args:
        cfg: With ``model`` and ``data``.

    Raises:
        LoraConfigError: Something cannot be had, or something is wrong with the rows.
    """
    from lora_lightning.tasks import ModelConfig
    from lora_lightning.tasks.files import fetch_model

    model = ModelConfig.of(OmegaConf.to_container(cfg.model, resolve=True))  # type: ignore[arg-type]  # a group is a dict
    return [Prepared(f"Model {model.name}", fetch_model(model)), _prepare_rows(cfg, model)]


def _prepare_rows(cfg: DictConfig, model: ModelConfig) -> Prepared:
    from lora_lightning.cli.build import make_data
    from lora_lightning.data.cache import place_of
    from lora_lightning.data.module import DataModule
    from lora_lightning.tasks import load_tokenizer

    tokenizer = load_tokenizer(model)
    data = make_data(cfg, tokenizer, keep=True)
    what = f"Rows of {type(data).__name__}"
    data.prepare_data()
    if not isinstance(data, DataModule) or not data.cache:
        why = "as data.cache=false says" if cfg.data.get("cache") is False else "this data set is read in training"
        return Prepared(what, None, f"not tokenised beforehand, {why}")
    data.keep_quiet()
    data.setup("fit")
    train, validation = len(data.loaded.train), len(data.loaded.validation)  # type: ignore[arg-type]  # no stream is kept
    return Prepared(what, place_of(data, tokenizer), f"{train:,} for training and {validation:,} for validation")


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


if __name__ == "__main__":
    main()
