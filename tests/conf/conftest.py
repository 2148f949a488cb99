from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Composes a shipped configuration: composed("lora.r=8", config="train")."""
    GlobalHydra.instance().clear()
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        yield lambda *overrides, config="train": compose(config, overrides=list(overrides))
    GlobalHydra.instance().clear()
