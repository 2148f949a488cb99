"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes and reads them.

Beside them ``lora_lightning.json`` holds what PEFT has no place for (the base's fingerprint, the chain of adapters
folded in before) and ``modules_outside.safetensors``, only where needed, what trains around the transformers model.
Nothing in such a folder is ever unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.facts import (
    CONFIG_FILE,
    OUTSIDE_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    adapter_state,
    describe,
)
from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.hub import adapter_folder
from lora_lightning.adapters.joined import is_start, joined
from lora_lightning.adapters.one_scale import with_one_scale
from lora_lightning.adapters.peft_config import from_peft_config
from lora_lightning.adapters.peft_embeddings import warn_of_other_rows, whole_embeddings
from lora_lightning.adapters.peft_names import PREFIX, as_written_here, peft_names, prefix_hint
from lora_lightning.adapters.peft_notes import attentions_in, warn_of_peft, without_unused
from lora_lightning.adapters.tensor_file import is_finite, names_in, read_tensors, write_tensors
from lora_lightning.adapters.tied_files import tied_values, without_tied
from lora_lightning.adapters.written import unwritten, written_aside
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection import LoraReport, freeze_base, report_of, unload_lora
from lora_lightning.injection.attentions import meant_by
from lora_lightning.injection.beside import token_rows
from lora_lightning.injection.inject import inject_unfilled
from lora_lightning.injection.matching import pattern_value
from lora_lightning.injection.names import find_root, join, unwrap
from lora_lightning.injection.starts.residual import weight_before
from lora_lightning.injection.state import (
    adapter_tensors,
    injected_roots,
    load_lora_state,
    lora_layers,
    lora_state_dict,
    record_of,
    the_root,
)

BASE_COPY = ".base_layer.weight"  # PEFT saves the base weight of an adapted embedding or head; the base has its own
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # PEFT does not save them
_UNSAVED = (BASE_COPY, *STATISTICS)  # what one file has and another need not have


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False, fold_scaling: bool = False
) -> Path:
    """Write a model's adapter as a folder that PEFT, transformers and :func:`load_adapter` read.

    Args:
        model: An injected model, or a LightningModule around one.
        folder: Made if need be.
        overwrite: Replace an adapter that is there already.
        fold_scaling: Put every layer's scale into its ``B``, and fill smaller ranks up with zeros, so that one rank and
            one scale are right for all: for servers that pass over ``rank_pattern`` and ``alpha_pattern`` (vLLM).

    Returns:
        The folder.

    Raises:
        AdapterError: If there is no adapter, its values are not finite, the folder holds one already, or with
            ``fold_scaling`` it has more than such a server reads (DoRA, biases, modules trained in full).
    """
    state = joined(adapter_state(model))
    facts = describe(model)
    if fold_scaling:
        facts, state = with_one_scale(facts, state)
    warn_of_peft(the_root(model)[1], str(folder), written_here=True)
    return write_folder(facts, state, folder, overwrite=overwrite)


def write_folder(
    facts: AdapterFacts, state: Mapping[str, Tensor], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write an adapter folder from facts and values; files are written aside and renamed, weights last."""
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).exists() and not overwrite:
        raise AdapterError(f"{folder} holds an adapter already: choose another folder, or pass overwrite=True")
    check_finite(state)
    state = joined(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG_FILE, _json(facts.config))
        _write(folder / RECORD_FILE, _json(facts.record))
        if facts.outside:
            write_tensors(folder / OUTSIDE_FILE, {name: state[name] for name in facts.outside})
        else:
            (folder / OUTSIDE_FILE).unlink(missing_ok=True)  # that of the adapter which was there
        weights = {key: state[name] for name, key in facts.keys.items()} | tied_values(facts.tied, state)
        write_tensors(folder / WEIGHTS_FILE, weights)
    except OSError as error:
        raise unwritten(folder, error) from error
    return folder


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that has a NaN or an infinity in it.

    Raises:
        AdapterError: With the names.
    """
    if bad := sorted(name for name, value in state.items() if not is_finite(value)):
        raise AdapterError(f"not saved, the adapter has values that are not finite: {', '.join(bad[:4])}")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> LoraReport:
    """Read an adapter folder into a model, injecting first if need be.

    Args:
        model: The base model, or a LightningModule around it; or one injected with the same config.
        folder: An adapter folder, ours or PEFT's, or one on the Hugging Face Hub: ``owner/name[@revision]``.
        trainable: Let the adapter train; else all of the model is frozen.

    Returns:
        What was adapted.

    Raises:
        AdapterError: If the folder does not fit, or the model has no memory yet (:func:`load_base` comes first); the
            model is as it was then.
    """
    folder, model = adapter_folder(folder), unwrap(model)
    config, weights = read_config(model, folder), read_weights(folder)
    fresh = not injected_roots(model)
    if fresh:
        try:
            inject_unfilled(model, _with_outside(config, folder, model))
        except LoraConfigError as error:
            raise AdapterError(f"{folder} does not fit this model: {error}") from error
    try:
        prefix, root = the_root(model)
        names = {key: join(prefix, name) for name, key in peft_names(root).items()}
        weights = without_unused(without_tied(weights, root, str(folder)), attentions_in(root), str(folder))
        copies = {f"{PREFIX}{name}{BASE_COPY}" for name, _ in (*lora_layers(root), *token_rows(root))}
        plain = {name: layer for name, layer in lora_layers(root) if weight_before(layer) is None}
        warn_of_other_rows(
            {f"{PREFIX}{name}{BASE_COPY}": layer.weight for name, layer in plain.items()}, weights, str(folder)
        )
        given = {names.get(key, key): value for key, value in weights.items() if key not in copies}
        hint = whole_embeddings(root, weights) or prefix_hint(
            *([key for key in keys if not key.endswith(_UNSAVED)] for keys in (weights, names))
        )
        given |= _read_outside(folder, model)
        own = {name for name in adapter_tensors(model) if not is_start(name)}
        _check_fit(root, config, given, own, folder, hint)
        load_lora_state(model, lora_state_dict(model) | given, str(folder))
    except BaseException:
        if fresh:
            unload_lora(model)
        raise
    _remember(root, folder)
    if trainable:
        freeze_base(model)
    else:
        model.requires_grad_(False)
    return report_of(model)


def read_config(model: nn.Module, folder: str | os.PathLike[str]) -> LoraConfig:
    """The LoRA config of an adapter folder, as it applies to a model.

    Args:
        model: The base model, or a LightningModule around it.
        folder: An adapter folder, ours or PEFT's, or one on the Hub.

    Raises:
        AdapterError: If it is none.
        LoraConfigError: If it asks for what is not known here.
    """
    folder = adapter_folder(folder)
    _, root = find_root(unwrap(model))
    return from_peft_config(read_peft_config(folder), root, str(folder / CONFIG_FILE))


def read_peft_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``adapter_config.json`` of an adapter folder (or one on the Hub) says."""
    folder = adapter_folder(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {folder}")
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.glob("*"))[:8]) or "nothing"
        raise AdapterError(f"{folder} is not an adapter folder: no {CONFIG_FILE} in it (it holds {there})")
    return _read_json(path)


def check_folder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an adapter folder as far as that needs no model: its config, after its values have been looked at.

    Raises:
        AdapterError: If it is no adapter folder, damaged, or holds a NaN or an infinity.
    """
    config = read_peft_config(folder)
    read_weights(Path(folder))
    return config


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``lora_lightning.json`` says; empty for a folder that PEFT wrote.

    Args:
        folder: An adapter folder, or one on the Hub.
    """
    path = adapter_folder(folder) / RECORD_FILE
    return _read_json(path) if path.is_file() else {}


def chain_of(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The adapters below a new one that is trained over this folder's, oldest first."""
    return tuple(place_of(each) for each in (*read_record(folder).get("bases", ()), folder))


def place_of(folder: str | os.PathLike[str]) -> str:
    """How a chain names an adapter: a folder of this machine as an absolute path, one on the Hub by its name there."""
    return os.path.abspath(folder) if os.path.exists(folder) else os.fspath(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is not a JSON object, it begins with {str(content)[:40]!r}")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by PEFT's names for them."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = ""
        if (folder / "adapter_model.bin").exists():
            hint = "; adapter_model.bin is a pickle, which is not read here: save it as safetensors with PEFT first"
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    tensors = read_tensors(path)
    if tensors and not any(key.startswith(PREFIX) for key in tensors):
        warnings.warn(f"{path}: keys lack PEFT's prefix {PREFIX!r}; read as if they had it", stacklevel=3)
        tensors = {PREFIX + key: value for key, value in tensors.items()}
    return {as_written_here(key): value for key, value in tensors.items()}


def _read_outside(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """What trains around the root: read where ``model`` has those modules, told where it has not."""
    path = folder / OUTSIDE_FILE
    if not path.is_file():
        return {}
    tensors = read_tensors(path)
    known = lora_state_dict(model).keys()
    if missing := sorted(tensors.keys() - known):
        warnings.warn(
            f"{path} holds {', '.join(missing[:4])}, which lie outside this model: load the adapter into the module "
            "around it to have them too",
            stacklevel=3,
        )
    return {name: value for name, value in tensors.items() if name in known}


def _with_outside(config: LoraConfig, folder: Path, model: nn.Module) -> LoraConfig:
    """The config with the modules around the root that the folder has values for, where ``model`` has them."""
    path = folder / OUTSIDE_FILE
    if not path.is_file():
        return config
    owners = {name.rpartition(".")[0] for name in names_in(path)}
    found = sorted(owners & {name for name, _ in model.named_modules() if name})
    return replace(config, modules_to_save=[*(config.modules_to_save or []), *found]) if found else config


def _check_fit(
    root: nn.Module, config: LoraConfig, given: Mapping[str, Tensor], own: set[str], folder: Path, hint: str
) -> None:
    """Refuse a file that leaves part of the adapter out, or that means another scale than the layers have."""
    problems = []
    if hint and not own - given.keys():
        problems.append(hint)
    if missing := sorted(name for name in own - given.keys() if not name.endswith(STATISTICS)):
        problems.append(f"missing: {', '.join(missing[:4])}" + (f" and {len(missing) - 4} more" if missing[4:] else ""))
        problems += [hint] if hint else []
    layers = dict(lora_layers(root))
    for name, layer in layers.items():
        meant = layer.lora_meant(meant_by(name, layers))
        r = int(pattern_value(config.rank_pattern, meant, config.r))
        scaling = config.scaling(r, pattern_value(config.alpha_pattern, meant, config.lora_alpha))
        if (r, scaling) != (layer.lora_r, layer.lora_scaling):
            problems.append(
                f"{name} has r={layer.lora_r}, scale {layer.lora_scaling:g} in the model; "
                f"the folder means r={r}, scale {scaling:g}"
            )
    if problems:
        more = [f"{len(problems) - 4} more layers differ"] if problems[4:] else []
        raise AdapterError(f"{folder} does not fit this model:" + "".join(f"\n  - {p}" for p in problems[:4] + more))


def _remember(root: nn.Module, folder: Path) -> None:
    """Take over the folder's record, and warn where the base is not the one that the adapter was trained on."""
    record, own = read_record(folder), record_of(root)
    own.bases, own.source = tuple(record.get("bases", ())), str(folder.resolve())
    if not record:
        warn_of_peft(root, str(folder), written_here=False)
    warn_of_other_base(record, fingerprint(root), str(folder))


def warn_of_other_base(record: Mapping[str, Any], own: str | None, source: str) -> None:
    """Warn where a record's fingerprint is not that of the base."""
    told = record.get("base_fingerprint")
    if told and own and told != own:
        chain = record.get("bases")
        why = (
            f"it was trained over a base with {', '.join(chain)} folded in: load_adapter and merge_lora those first"
            if chain
            else "another version of the weights, or the same ones in another precision"
        )
        warnings.warn(f"{source}: the base model is not the one this adapter was trained on ({why})", stacklevel=4)


def _json(content: Mapping[str, Any]) -> bytes:
    """Keys sorted, but for those of patterns: the first that matches counts."""
    return (json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with written_aside(path) as file:
        file.write(content)
