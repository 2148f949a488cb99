"""The presets of the group ``lora``, as Hydra composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from lora_lightning.cli.overrides import GlobalHydraKept
from lora_lightning.config import LoraConfig
from scripts.reference_parts import markdown
from scripts.reference_parts.settings import PRESETS, File


def table() -> str:
    """One row a preset: what it sets, its learning rate, what it is for."""
    rows = []
    with GlobalHydraKept(), initialize_config_module("lora_lightning.conf", version_base="1.3"):
        for path in sorted((PRESETS / "lora").glob("*.yaml")):
            rows.append(_row(path.stem, compose("train", overrides=[f"lora={path.stem}"]), File(path).about))
    return markdown.table(("`lora=`", "r", "alpha", "scale", "dropout", "else", "learning rate", "what it is"), rows)


def _row(name: str, composed: DictConfig, about: str) -> tuple[str, ...]:
    config = LoraConfig.from_dict(composed.lora)
    return (
        markdown.code(name),
        str(config.r),
        f"{config.lora_alpha:g}",
        f"{config.scaling():g}",
        f"{config.lora_dropout:g}",
        ", ".join(_else(config)),
        f"{composed.optimizer.lr:g}",
        about.partition(" Scale ")[0],
    )


def _else(config: LoraConfig) -> list[str]:
    """What makes it other than plain LoRA."""
    switches = {"`use_rslora`": config.use_rslora, "`use_dora`": config.use_dora}
    start = [] if config.init_lora_weights is True else [f"begins as `{config.init_lora_weights}`"]
    return [name for name, is_on in switches.items() if is_on] + start
