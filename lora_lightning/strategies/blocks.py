"""The repeated blocks of a network, which are the units that sharding engines gather and checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp.wrap import _Policy

from lora_lightning.errors import LoraConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a network: children of an ``nn.ModuleList`` of several of one class."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            children = list(module)
            if len(children) > 1 and len({type(child) for child in children}) == 1:
                found += children
                inside |= {id(part) for child in children for part in child.modules()}
    return found


class WrapBlocks(_Policy):
    """FSDP's ``auto_wrap_policy``: a unit for each repeated block, whatever the architecture calls it.

    Args:
        classes: Names of classes to wrap instead, as in ``["LlamaDecoderLayer"]``.
    """

    def __init__(self, classes: list[str] | None = None) -> None:
        self.classes = None if classes is None else list(classes)

    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        found = blocks(root_module)
        if self.classes is not None:
            found = [module for module in root_module.modules() if type(module).__name__ in self.classes]
        found = [module for module in found if module not in ignored_modules]
        if not found:
            raise LoraConfigError(
                f"no module to wrap: {self.classes or 'no nn.ModuleList of several blocks'} in this model; name the "
                "class of its blocks: auto_wrap_policy=WrapBlocks(['LlamaDecoderLayer'])"
            )
        return {module: dict(root_kwargs) for module in found}
