"""A base model's weights from safetensors, of which each process reads the part that it keeps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.errors import AdapterError, did_you_mean
from lora_lightning.injection.initialise import generator_for
from lora_lightning.injection.inject import default_seed
from lora_lightning.injection.matching import matches
from lora_lightning.injection.materialise import Part, Place, low_rank_ids, places, start_adapters
from lora_lightning.injection.names import find_root, unwrap
from lora_lightning.injection.state import differences, injected_roots, record_of
from lora_lightning.injection.targets import output_embeddings

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Older Llamas were saved with these buffers, which every version of the class computes by itself.
_COMPUTED = (r"rotary_emb\.inv_freq$",)


def load_base(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fresh: Sequence[str] = (),
    unused: Sequence[str] = (),
    seed: int | None = None,
) -> None:
    """Fill a model that was built without memory, sharded or not, from a folder of safetensors.

    Build the network under :func:`meta_parameters`, inject the adapter or leave that to the callback, shard it
    (``fully_shard``, ``parallelize_module``), then call this. Each process reads and keeps its part of every tensor,
    so that a model larger than one process's memory is never whole in it. Adapters that have no memory yet start as
    injection would have started them, equal on all processes. Parameters that have memory are filled in place.

    Classes that transformers saves under other names than their parameters' (experts fused into one tensor) have to be
    loaded by ``from_pretrained``.

    Args:
        model: A network, or a LightningModule around a transformers model.
        folder: With ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names, as
            ``save_pretrained`` writes them; names may have the prefix of the class's backbone or lack it.
        device: Where the weights go; None is the device of the model's ``DTensor`` mesh, else the CPU.
        dtype: Of the base's floating-point parameters; None keeps what the model was built in. Adapters keep theirs.
        fresh: Names of modules that the folder does not have, such as a classifier's ``score``: their weights are drawn
            from a normal distribution (of the config's ``initializer_range``, else 0.02), biases are zero.
        unused: Names of modules of the folder that the model does not have, such as ``lm_head``.
        seed: For ``fresh``; None takes ``PL_GLOBAL_SEED``, else 0.

    Raises:
        AdapterError: If names or shapes differ, or a file is missing; the model is as it was then.
    """
    model = unwrap(model)
    root = find_root(model)[1]
    if any(record_of(each).replicated is not None for each in injected_roots(model).values()):
        raise AdapterError(
            "load_base comes before layer_replication: names in the folder are those of the model's own layers. Fill "
            "the model first, then inject the adapter"
        )
    stored = _stored(Path(folder))
    low_rank = low_rank_ids(model)
    base = [place for place in places(root) if id(place.tensor) not in low_rank]
    sources = {id(place): name for place in base if (name := _source(place, stored, root)) is not None}
    news = [place for place in base if id(place) not in sources and _inside(fresh, place.names[0])]
    lacking = [place for place in base if id(place) not in sources and not _inside(fresh, place.names[0])]
    read = set(sources.values()) | {alias for place in base for alias in _aliases(place, root)}
    ignorable = [*_COMPUTED, *(getattr(root, "_keys_to_ignore_on_load_unexpected", None) or ())]
    spare = {
        name
        for name in stored
        if name not in read and not _inside(unused, name) and not any(re.search(pattern, name) for pattern in ignorable)
    }
    given = {sources[id(place)]: place.tensor for place in base if id(place) in sources}
    _check(given, lacking, spare, stored, folder)
    _check_the_rest(model, root, low_rank)

    there = _device(model) if device is None else torch.device(device)
    # A file is opened for each tensor: pages of it count as this process's memory for as long as it is open.
    for place in base:
        if id(place) in sources:
            name = sources[id(place)]
            place.fill(lambda part, name=name: _read(stored[name][0], name, part), there, dtype)  # type: ignore[misc]
    seed = default_seed() if seed is None else seed
    spread = float(getattr(getattr(root, "config", None), "initializer_range", 0.02))
    for place in news:
        value = torch.zeros(place.tensor.shape, device="cpu", dtype=torch.float32)
        if value.ndim > 1:
            value.normal_(0, spread, generator=generator_for(seed, place.names[0]))
        place.fill(value.__getitem__, there, dtype)
    start_adapters(model, there)


def _read(path: Path, name: str, part: Part) -> Tensor:
    # Lightning calls configure_model with another default device, to which a whole file would be copied.
    with torch.device("cpu"), safe_open(path, framework="pt") as file:
        if not part:
            return file.get_tensor(name)
        if any(s.start == s.stop for s in part):  # more processes than rows
            return torch.empty([s.stop - s.start for s in part])
        return file.get_slice(name)[part]


def _stored(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """What a folder holds: the file of each tensor, and a tensor of its shape and dtype without memory."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        files = [_ONE]
    if odd := [name for name in files if Path(name).name != name]:
        raise AdapterError(f"{folder / _INDEX} names a file outside its folder: {odd[0]!r}")
    if absent := [name for name in files if not (folder / name).is_file()]:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) if folder.is_dir() else "no such folder"
        raise AdapterError(
            f"{folder} has no {absent[0]}: a folder written by save_pretrained (safetensors) is wanted, with {_ONE} or "
            f"{_INDEX} and the files it names. There is: {there or 'nothing'}"
        )
    found: dict[str, tuple[Path, Tensor]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                header = file.get_slice(key)
                found[key] = (folder / name, _without_memory(header.get_shape(), header.get_dtype()))
    return found


def _without_memory(shape: list[int], dtype: str) -> Tensor:
    """Floating point or not is all that matters of a dtype here."""
    kind = torch.float32 if dtype.startswith(("F", "BF")) else torch.int64
    return torch.empty(shape, dtype=kind, device="meta")


def _source(place: Place, stored: dict[str, Any], root: nn.Module) -> str | None:
    """The name under which a folder holds a tensor: one of the tensor's own, or of what it is tied to."""
    return next((name for name in _aliases(place, root) if name in stored), None)


def _aliases(place: Place, root: nn.Module) -> list[str]:
    """Names that a tensor may be stored under: its own first, then with or without the backbone's prefix."""
    names = list(place.names)
    head = output_embeddings(root)
    tied = getattr(getattr(root, "config", None), "tie_word_embeddings", False)
    if tied and head is not None and (head, "weight") in place.owners:
        # Tied, even where a parallel plan has given the head a tensor of its own.
        embeddings = cast("Any", root).get_input_embeddings()
        names += [name for other in places(root) if (embeddings, "weight") in other.owners for name in other.names]
    prefix = f"{getattr(root, 'base_model_prefix', '') or ''}."
    if prefix == ".":
        return names
    return names + [n.removeprefix(prefix) if n.startswith(prefix) else prefix + n for n in names]


def _inside(modules: Sequence[str], name: str) -> bool:
    """Whether a tensor is somewhere in a module that a list of (ends of) names means."""
    while name := _module(name):
        if matches(list(modules), name):
            return True
    return False


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _check(
    given: dict[str, Tensor],
    lacking: list[Place],
    spare: set[str],
    stored: dict[str, tuple[Path, Tensor]],
    folder: str | os.PathLike[str],
) -> None:
    expected = given | {place.names[0]: place.tensor for place in lacking}
    problems = differences(expected, {name: stored[name][1] for name in (*given, *spare)})
    problems += [
        f"{name} is stored as whole numbers, the model's is {tensor.dtype}: a quantised checkpoint"
        for name, tensor in given.items()
        if stored[name][1].is_floating_point() != tensor.is_floating_point()
    ][:4]
    if lacking and spare:
        near = did_you_mean(lacking[0].names[0], spare)
        problems += [f"{lacking[0].names[0]}{near}"] if near else []
    if lacking:
        problems.append(f"fresh=[{_module(lacking[0].names[0])!r}] starts a module that the folder does not have")
    if spare:
        problems.append(f"unused=[{_module(min(spare))!r}] passes over a module that the model does not have")
    if problems:
        raise AdapterError(f"{os.fspath(folder)} does not fit this model:" + "".join(f"\n  - {p}" for p in problems))


def _check_the_rest(model: nn.Module, root: nn.Module, low_rank: set[int]) -> None:
    """Whatever else has no memory is not in the folder."""
    below = {id(place.tensor) for place in places(root)} | low_rank
    rest = [name for name, tensor in model.named_parameters() if tensor.is_meta and id(tensor) not in below]
    if rest:
        raise AdapterError(
            f"{', '.join(rest[:4])}: on the meta device and outside the model that the folder is for; make it outside "
            "meta_parameters()"
        )
    persistent = {id(place.tensor) for place in places(root)}
    if rest := [name for name, tensor in model.named_buffers() if tensor.is_meta and id(tensor) not in persistent]:
        raise AdapterError(
            f"{', '.join(rest[:4])}: buffers on the meta device that no file holds; build the model in "
            "`with meta_parameters():` instead of `with torch.device('meta'):`, which leaves buffers their values"
        )


def _device(model: nn.Module) -> torch.device:
    meshes = (p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor))
    kind = next(meshes, "cpu")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
