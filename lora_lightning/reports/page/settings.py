"""The settings of a run in the order in which they matter: LoRA, model, data, training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lora_lightning.config import LoraConfig
from lora_lightning.reports.page.words import setting

# What is always shown, and what only where it was typed; of the rest, whatever is set.
_FIRST = {
    "model": ("name", "dtype"),
    "data": ("path", "batch_size", "max_length", "train_on"),
    "optimizer": ("lr", "weight_decay"),
    "trainer": ("max_steps", "max_epochs", "precision", "gradient_clip_val"),
}
_QUIET = {
    "model": {"double_quantisation", "trust_remote_code"},
    "data": {"num_workers", "samples", "cache", "seed"},
    "optimizer": {"eps", "betas", "_partial_"},
    "scheduler": {"_partial_"},
    "trainer": {
        "enable_model_summary",
        "default_root_dir",
        "log_every_n_steps",
        "num_sanity_val_steps",
        "enable_progress_bar",
    },
}
_ONE = {"devices", "num_nodes", "accumulate_grad_batches"}  # of which one is nothing out of the ordinary
_PLAIN: tuple[Any, ...] = (None, False, "", "auto", [], {}, 0.0)  # values that say: nothing out of the ordinary


@dataclass(frozen=True)
class Setting:
    """A setting as it is shown; ``given`` where it was typed."""

    key: str
    value: str
    given: bool = False


@dataclass(frozen=True)
class Group:
    """Settings that belong together."""

    title: str
    settings: list[Setting]


def what_matters(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Group]:
    """The settings to read first, in groups.

    Args:
        config: The resolved configuration.
        overrides: What was typed for it.
    """
    keys_typed = (override.partition("=")[0].lstrip("+~") for override in overrides)
    typed = {".".join(key.split(".")[:2]) for key in keys_typed}  # with data.samples.every=5 data.samples is

    def rows(node: str, keys: Iterable[str]) -> list[Setting]:
        content = _mapping(config, node)
        return [Setting(key, setting(content[key]), f"{node}.{key}" in typed) for key in keys if key in content]

    def group(node: str) -> list[Setting]:
        content = _mapping(config, node)
        first = [key for key in _FIRST.get(node, ()) if content.get(key) not in (None, -1)]
        hidden = {*_FIRST.get(node, ()), *_QUIET.get(node, ()), "_target_"}
        kind = content.get("_target_")
        named = (
            [Setting("class", str(kind).rpartition(".")[2])] if kind and node not in ("trainer", "scheduler") else []
        )
        rest = [key for key, value in content.items() if key not in hidden and not _is_plain(key, value)]
        asked = [key for key in content if f"{node}.{key}" in typed and key not in (*first, *rest, "_target_")]
        return [*named, *rows(node, [*first, *rest, *asked])]

    training = group("optimizer")
    schedule = _mapping(config, "scheduler").get("_target_")
    training += [Setting("schedule", str(schedule).rpartition(".")[2])] if schedule else []
    training += group("trainer")
    if "seed" in config:
        training.append(Setting("seed", setting(config["seed"]), "seed" in typed))
    groups = [
        Group("LoRA", _lora(_mapping(config, "lora"), typed)),
        Group("Model", group("model")),
        Group("Data", group("data")),
        Group("Training", training),
    ]
    return [each for each in groups if each.settings]


def _lora(lora: Mapping[str, Any], typed: set[str]) -> list[Setting]:
    """The five decisions, the scale that two of them make, and whatever else is not as it comes."""
    first = ("r", "lora_alpha", "target_modules", "lora_dropout")
    defaults = {each.name: each.default for each in fields(LoraConfig)}
    rows = [Setting(key, setting(lora[key]), f"lora.{key}" in typed) for key in first if key in lora]
    r, alpha = lora.get("r"), lora.get("lora_alpha")
    if isinstance(r, int) and isinstance(alpha, (int, float)) and r > 0:
        scale = alpha / (r**0.5 if lora.get("use_rslora") else r)
        rows.insert(2, Setting("scale", f"{scale:.4g}"))
    others = [
        key
        for key, value in lora.items()
        if key not in first and (f"lora.{key}" in typed or (value not in _PLAIN and value != defaults.get(key)))
    ]
    return rows + [Setting(key, setting(lora[key]), f"lora.{key}" in typed) for key in others]


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value says nothing."""
    return value in _PLAIN or (key in _ONE and value == 1)


def _mapping(config: Mapping[str, Any], node: str) -> Mapping[str, Any]:
    found = config.get(node)
    return found if isinstance(found, dict) else {}
