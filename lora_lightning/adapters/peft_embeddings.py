"""Whole embeddings that PEFT has saved beside an adapter (``save_embedding_layers``), because tokens were added."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import trained_in_full
from lora_lightning.layers import LoraLayer


def whole_embeddings(root: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What to do about embeddings in a file that are neither adapted nor trained in full; nothing where there are none.

    Args:
        root: The injected root.
        weights: The file's tensors by PEFT's names.
    """
    ends = [getattr(root, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    known = {id(module) for _, module, _ in trained_in_full(root)}
    names = [
        name
        for name, module in canonical_modules(root)
        if any(module is end for end in ends) and not isinstance(module, LoraLayer) and id(module) not in known
    ]
    if found := [name for name in names if f"{PREFIX}{name}.weight" in weights]:
        return (
            f"PEFT has saved all of {' and '.join(found)} with it (save_embedding_layers): name them in "
            "modules_to_save of adapter_config.json to load them as trained in full, or save it again with "
            "save_embedding_layers=False"
        )
    return ""


@torch.no_grad()
def warn_of_other_rows(base: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Warn where the base weight that a file has of an adapted embedding is not the base's: PEFT takes the file's.

    Args:
        base: Weights of the model by PEFT's names for them.
        weights: The file's tensors.
        source: The file or folder.
    """
    for key in base.keys() & weights.keys():
        here, there = base[key], weights[key]
        if isinstance(here, DTensor) or here.is_meta or here.shape != there.shape:
            continue  # of other shapes more is told
        differ = (here != there.to(here.device, here.dtype)).flatten(1).any(1).nonzero().flatten().tolist()
        if differ:
            warnings.warn(
                f"{source}: {key} is not the base's weight in {len(differ)} rows (first: {differ[0]}), as where tokens "
                "were added: PEFT takes the file's, and here the base's stay. Copy it into the base before loading, if "
                "the base is to have it",
                stacklevel=4,
            )
