"""What PEFT writes twice: tensors of a layer that is tied to an embedding, beside the embedding's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.adapters.peft_names import PREFIX, peft_names
from lora_lightning.errors import AdapterError
from lora_lightning.injection.state import lora_layers, record_of

Tied = dict[str, list]
"""Key in the file to [our name of the embedding's tensor, whether transposed]."""


def tied_names(root: nn.Module) -> Tied:
    """The keys of layers tied to an embedding that is adapted or trained in full."""
    found: Tied = {}
    adapted = dict(lora_layers(root))
    for name, source in record_of(root).followers.items():
        if name in adapted:
            found[f"{PREFIX}{name}.lora_A.weight"] = [f"{source}.lora_B", True]
            found[f"{PREFIX}{name}.lora_B.weight"] = [f"{source}.lora_A", True]
        else:
            found[f"{PREFIX}{name}.weight"] = [f"{source}.weight", False]
    return found


def tied_values(tied: Mapping[str, list], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values under those keys, from a state by our names."""
    return {
        key: state[name].t().contiguous() if transposed else state[name].clone()
        for key, (name, transposed) in tied.items()
    }


def without_tied(weights: Mapping[str, Tensor], root: nn.Module, source: str) -> dict[str, Tensor]:
    """A file's tensors without those keys, after they have been found to say what the embedding's say.

    Raises:
        AdapterError: If they do not: layers that are tied cannot have both.
    """
    tied, keys = tied_names(root), peft_names(root)
    for key, (name, transposed) in tied.items():
        value = weights.get(keys[name])
        if key not in weights or value is None:
            continue  # not every writer has them; what the embedding lacks is told elsewhere
        if not torch.equal(weights[key], value.t() if transposed else value):
            raise AdapterError(
                f"{source} does not fit this model: {key} is not that of the embedding ({keys[name]}), and "
                "ensure_weight_tying makes one of them; set it to false in adapter_config.json to let them part"
            )
    return {key: value for key, value in weights.items() if key not in tied}
