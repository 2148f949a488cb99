"""What makes an adapter folder but the values in it: the names of its files, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import lora_lightning
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.peft_config import to_peft_config
from lora_lightning.adapters.peft_names import peft_names
from lora_lightning.adapters.tied_files import tied_names
from lora_lightning.config_starts import changes_base
from lora_lightning.injection.names import is_below, join, unwrap
from lora_lightning.injection.state import (
    adapter_tensors,
    lora_state_dict,
    record_of,
    refuse_disabled,
    the_root,
    trained_in_full,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "lora_lightning.json"
OUTSIDE_FILE = "modules_outside.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, OUTSIDE_FILE)


@dataclass
class AdapterFacts:
    """All that makes an adapter folder but the values: fit for JSON, and kept in checkpoints.

    Attributes:
        config: Content of ``adapter_config.json``.
        keys: Name below the model that was described to key in ``adapter_model.safetensors``.
        outside: Names that belong into ``modules_outside.safetensors``.
        record: Content of ``lora_lightning.json``.
        tied: Further keys of a layer tied to an embedding, each with [name of the embedding's, whether transposed].
    """

    config: dict[str, Any]
    keys: dict[str, str]
    outside: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, list] = field(default_factory=dict)


def describe(model: nn.Module) -> AdapterFacts:
    """The facts of an injected model's adapter, its names relative to ``model``."""
    model = unwrap(model)
    prefix, root = the_root(model)
    outside = [
        join(name, local)
        for name, _, originals in trained_in_full(model)
        if not is_below(name, prefix)
        for local in originals
    ]
    record = record_of(root)
    return AdapterFacts(
        config=to_peft_config(root),
        keys={join(prefix, name): key for name, key in peft_names(root).items()},
        outside=outside,
        tied={key: [join(prefix, name), transposed] for key, (name, transposed) in tied_names(root).items()},
        record={
            "version": lora_lightning.__version__,
            "base_fingerprint": fingerprint(root),
            "bases": list(record.bases),
        }
        # The file's adapter has twice the rank then: it is for the base as it was.
        | ({"began_as": how} if changes_base(how := record.config.init_lora_weights) else {}),
    )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What goes into the folder: the root's state, and what trains outside it (nothing else around the model).

    Raises:
        AdapterError: If there is no adapter, or it is switched off (:func:`lora_disabled`).
    """
    model = unwrap(model)
    refuse_disabled(model)
    prefix, _ = the_root(model)
    own = adapter_tensors(model).keys()
    return {name: value for name, value in lora_state_dict(model).items() if is_below(name, prefix) or name in own}
