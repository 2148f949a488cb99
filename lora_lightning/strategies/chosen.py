"""Which part of a LightningModule is adapted, by which config, over which base."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from lora_lightning.adapters import read_config
from lora_lightning.adapters.folder import chain_of, place_of
from lora_lightning.adapters.merge import fold_in
from lora_lightning.config import LoraConfig
from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.injection import check_config
from lora_lightning.injection.state import injected_roots, record_of


def balanced() -> LoraConfig:
    """The config of a ``LoraCallback()`` without one: r=16, alpha 32, all linear layers, dropout 0.05."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)


def target_of(pl_module: pl.LightningModule, attribute: str | None) -> nn.Module:
    """The module below which adapters go: all of the LightningModule, or one attribute.

    Raises:
        LoraConfigError: If there is no such attribute.
    """
    if attribute is None:
        return pl_module
    try:
        return pl_module.get_submodule(attribute)
    except AttributeError:
        names = [name for name, _ in pl_module.named_modules() if name and name.count(".") < 2]
        raise LoraConfigError(
            f"module={attribute!r}: {type(pl_module).__name__} has no such attribute"
            f"{did_you_mean(attribute, names)}. It has {', '.join(names[:12]) or 'no modules'}"
        ) from None


def config_for(
    target: nn.Module, pl_module: pl.LightningModule, given: LoraConfig | None, adapter: str | None
) -> LoraConfig:
    """The config to inject: the given one, that of an adapter's folder, of the injected model, or the balanced one.

    Raises:
        LoraConfigError: If what is given contradicts the folder, or the task of the LightningModule.
    """
    earlier = injected_roots(target)
    if given is None and earlier:
        return record_of(next(iter(earlier.values()))).config
    saved = None if adapter is None else read_config(target, adapter)
    config = given or saved or balanced()
    if given is not None and saved is not None:
        _refuse_contradiction(given, saved, str(adapter))
    task = getattr(pl_module, "lora_task_type", None)
    if task is not None and config.task_type not in (None, task):
        raise LoraConfigError(
            f"task_type={config.task_type!r} contradicts {type(pl_module).__name__}, which trains {task!r}: "
            f"leave task_type out, or choose the task that goes with it"
        )
    if task is not None and config.task_type is None:
        config = LoraConfig.from_dict(config.to_dict() | {"task_type": task})
    return config


def fold_in_first(target: nn.Module, config: LoraConfig, folder: str) -> None:
    """Make a saved adapter part of the base, after those that it was trained over, unless that has been done.

    Raises:
        LoraConfigError: If the model is injected already, over another base.
    """
    roots = injected_roots(target)
    if not roots:
        check_config(target, config)  # before the base is changed
        for each in chain_of(folder):
            fold_in(target, each)
    elif place_of(folder) not in record_of(next(iter(roots.values()))).bases:
        raise LoraConfigError(
            f"base_adapter={folder!r} has to be folded in before injection, and this model is injected already: "
            "call load_adapter and merge_lora ahead of inject_lora, or leave injection to the callback"
        )


def _refuse_contradiction(config: LoraConfig, saved: LoraConfig, folder: str) -> None:
    """Which layers are meant is seen when the values are loaded: a saved config has them by other names."""
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern")
    mine, theirs = config.to_dict(), saved.to_dict()
    if differing := [f"{key}: {mine[key]!r} given, {theirs[key]!r} saved" for key in names if mine[key] != theirs[key]]:
        raise LoraConfigError(
            f"config contradicts the adapter in {folder}, which is to be continued:"
            + "".join(f"\n  - {line}" for line in differing)
            + "\nLeave config out to take the adapter's own."
        )
