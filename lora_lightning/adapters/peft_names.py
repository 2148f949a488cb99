"""PEFT's names for what an adapter holds, from ours and back.

Ours are relative to the root (``layers.0.q_proj.lora_A``); PEFT's carry a prefix and say what kind of layer it is
(``base_model.model.layers.0.q_proj.lora_A.weight``). Shapes are the same for every kind of layer here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_lightning.adapters.joined import is_start
from lora_lightning.adapters.nested_names import holders_of, nested_name
from lora_lightning.injection.attentions import meant_by
from lora_lightning.injection.state import lora_layers, lora_state_dict
from lora_lightning.layers.parameters import LoraParameter

PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"


def peft_names(root: nn.Module) -> dict[str, str]:
    """Our name to PEFT's name, for all that :func:`lora_state_dict` gives of an injected root but first values."""
    adapted = {name: layer.lora_kind for name, layer in lora_layers(root)}
    holders = holders_of(root)
    names = [name for name in lora_state_dict(root) if not is_start(name)]
    return {name: PREFIX + nested_name(_peft_name(name, adapted), holders) for name in names}


def _peft_name(name: str, adapted: dict[str, str]) -> str:
    layer, _, local = name.rpartition(".")
    kind, parent = adapted.get(layer), layer.rpartition(".")[0]
    if layer and adapted.get(parent) == "MultiheadAttention":  # PEFT wraps itself around that too
        layer = f"{parent}.base_layer.{layer.rpartition('.')[2]}"
        name = f"{layer}.{local}"
    if kind is None:
        return name  # a module trained in full, a bias of a layer that is not adapted, running statistics
    if local in ("lora_A", "lora_B"):
        if kind == "Embedding":
            return f"{layer}.lora_embedding_{local[-1]}"
        return f"{layer}.{local}.weight"
    if local == "lora_B_bias":
        return f"{layer}.lora_B.bias"
    if local == "lora_magnitude":
        return f"{layer}{_MAGNITUDE}.weight"
    return f"{layer}.base_layer.{local}"


def as_written_here(key: str) -> str:
    """A key of a file as :func:`peft_names` spells it.

    PEFT writes DoRA's magnitudes without ``.weight`` and reads them with and without it; transformers reads them only
    with it.

    >>> as_written_here("base_model.model.q_proj.lora_magnitude_vector")
    'base_model.model.q_proj.lora_magnitude_vector.weight'
    """
    return f"{key}.weight" if key.endswith(_MAGNITUDE) else key


def prefix_hint(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """What to do where a file's keys are the model's but for a beginning that one side has more; else nothing.

    >>> prefix_hint(["base_model.model.net.0.lora_A.weight"], ["base_model.model.0.lora_A.weight"])
    "its keys have 'net.' before the names in this model: it was saved from a model that holds this one as 'net'. Load \
it into that one"
    """
    keys, names = ({name.removeprefix(PREFIX) for name in side} for side in (theirs, ours))
    if (more := _beginning(keys, names)) is not None:
        return (
            f"its keys have {more!r} before the names in this model: it was saved from a model that holds this one as "
            f"{more[:-1]!r}. Load it into that one"
        )
    if (more := _beginning(names, keys)) is not None:
        return (
            f"this model's names have {more!r} before those in the file: it was saved from what is {more[:-1]!r} here. "
            f"Load it into that: load_adapter(model.{more[:-1]}, …), or LoraCallback(…, module={more[:-1]!r})"
        )
    return ""


def _beginning(longer: set[str], shorter: set[str]) -> str | None:
    """What all of ``longer`` begin with before a name of ``shorter``."""
    if not shorter:
        return None
    first = min(shorter)
    beginnings = [name.removesuffix(first) for name in longer if name.endswith(f".{first}")]
    return next((more for more in beginnings if {more + name for name in shorter} == longer), None)


def adapted_names(root: nn.Module) -> list[str]:
    """Names of the adapted layers below a root, as targets: an attention stands for its parts."""
    adapted = dict(lora_layers(root))
    layers = [name for name, layer in adapted.items() if not isinstance(layer, LoraParameter)]
    return [name for name in layers if meant_by(name, adapted) == name]


def short_targets(root: nn.Module) -> list[str]:
    """The shortest list that names exactly the adapted layers as PEFT matches a list: last parts where they suffice."""
    adapted = set(adapted_names(root))
    chosen: set[str] = set()
    by_last: dict[str, list[str]] = {}
    for name, _ in root.named_modules():
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    for name in adapted:
        last = name.rpartition(".")[2]
        exact = all(other in adapted for other in by_last.get(last, []))
        chosen.add(last if exact else name)
    return sorted(chosen)
