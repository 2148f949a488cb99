"""An adapter folder made anew for others: clean, complete, and where asked for as servers of one scale want it."""

from __future__ import annotations

import os
from pathlib import Path

from lora_lightning.adapters.facts import OUTSIDE_FILE, AdapterFacts
from lora_lightning.adapters.folder import read_peft_config, read_record, read_weights, write_folder
from lora_lightning.adapters.hub import adapter_folder, copy_tokenizer
from lora_lightning.adapters.one_scale import with_one_scale
from lora_lightning.adapters.pairs import refuse_changed_base
from lora_lightning.adapters.tensor_file import read_tensors


def export_folder(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    fold_scaling: bool = False,
    base: str | None = None,
) -> Path:
    """Write an adapter and its tokenizer, and nothing else that may lie beside them, into another folder.

    Args:
        source: An adapter folder, ours or PEFT's, or one on the Hub.
        folder: Where to; files of those names in it are not written over.
        fold_scaling: As of :func:`~lora_lightning.save_adapter`: one rank and one scale for all layers (vLLM).
        base: What ``adapter_config.json`` is to call the base model; None leaves it.

    Returns:
        The folder.

    Raises:
        AdapterError: The source is no adapter or damaged, ``folder`` holds one, or with ``fold_scaling`` it has more
            than such a server reads.
    """
    place = adapter_folder(source)
    config, weights = read_peft_config(place), read_weights(place)
    outside = read_tensors(place / OUTSIDE_FILE) if (place / OUTSIDE_FILE).is_file() else {}
    facts = AdapterFacts(
        config=dict(config) | ({} if base is None else {"base_model_name_or_path": base, "revision": None}),
        keys={key: key for key in weights},
        outside=list(outside),
        record=read_record(place),
    )
    state = weights | outside
    if fold_scaling:
        refuse_changed_base(config, str(source))
        facts, state = with_one_scale(facts, state)
    write_folder(facts, state, folder)
    copy_tokenizer(place, Path(folder))
    return Path(folder)
