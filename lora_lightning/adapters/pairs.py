"""The updates in an adapter's file: which two tensors make each, at what rank and scale, told by the file alone.

No model is needed: names and shapes say of what kind a layer is, and ``adapter_config.json`` says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import changes_base
from lora_lightning.errors import AdapterError
from lora_lightning.injection.matching import matches, pattern_value

A_ENDINGS = (".lora_A.weight", ".lora_embedding_A")
_AROUND = ".base_layer"  # what PEFT has in the name of a layer that it wraps inside another


@dataclass(frozen=True)
class Pair:
    """The update ``s · B A`` of one layer, as a file has it.

    Sizes: ``n`` updates that the layer has (the groups of a convolution, the experts of a mixture; else 1), each of
    rank ``r/n`` (groups) or ``r`` (all others).

    Attributes:
        a_key: Key of ``A``: ``(r, in, …)``; ``(n·r, in)`` of experts.
        b_key: Key of ``B``: ``(out, r/n, …)``; ``(out, r·n)`` of experts, which change fastest in it.
        layer: Name of the layer, without PEFT's wrappers around others.
        meant: The names by which a config may mean it, in ``rank_pattern`` for one.
        r: The rank that the config gives it.
        alpha: Numerator of the scale.
        scaling: The scale ``s``.
        groups: ``n`` of a convolution.
        experts: ``n`` of a mixture.
    """

    a_key: str
    b_key: str
    layer: str
    meant: tuple[str, ...]
    r: int
    alpha: float
    scaling: float
    groups: int = 1
    experts: int = 1

    def factors(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``A (n, k, in)`` and ``B (n, out, k)`` as matrices, ``k`` being the rank of each update."""
        a, b = weights[self.a_key].flatten(1), weights[self.b_key].flatten(1)
        if self.experts > 1:
            return a.unflatten(0, (self.experts, -1)), b.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return a.unflatten(0, (self.groups, -1)), b.unflatten(0, (self.groups, -1))

    def tensors(self, a: Tensor, b: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Matrices of any rank as the file would have them: the way back from :meth:`factors`."""
        old_a, old_b = weights[self.a_key], weights[self.b_key]
        whole_b = b.permute(1, 2, 0).flatten(1) if self.experts > 1 else b.flatten(0, 1)
        return {
            self.a_key: a.flatten(0, 1).reshape(-1, *old_a.shape[1:]).to(old_a.dtype).contiguous(),
            self.b_key: whole_b.reshape(len(old_b), -1, *old_b.shape[2:]).to(old_b.dtype).contiguous(),
        }


def pairs_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> list[Pair]:
    """The updates of an adapter, in the order of the file.

    Args:
        config: Content of ``adapter_config.json``.
        weights: Tensors by PEFT's names, as :func:`~lora_lightning.adapters.folder.read_weights` gives them.
        source: What to call the folder in a message.

    Raises:
        AdapterError: If there is none, a factor lacks the other, or the shapes are of other ranks than the config's.
    """
    pairs = [_pair(key, config, weights, source) for key in weights if key.endswith(A_ENDINGS)]
    if not pairs:
        raise AdapterError(f"{source} has no lora_A: there is no low-rank update in it")
    return pairs


def refuse_changed_base(config: Mapping[str, Any], source: str) -> None:
    """Raise where an adapter is for weights that its start has changed, and not for the base as everybody has it.

    So PEFT saves PiSSA, OLoRA and LoftQ unless it is told to convert them; what is saved here is for the base itself.

    Raises:
        AdapterError: With the way to one that is for the base.
    """
    how = config.get("init_lora_weights", True)
    if not changes_base(how):
        return
    remedy = "Make one that is: load_adapter(model, folder) over the base, and save_adapter(model, another folder)"
    if how == "loftq":
        remedy = "Train from another start for that, or merge it into the base as LoftQ has rounded it"
    raise AdapterError(
        f"{source} has init_lora_weights={how!r}: its update is for weights that this start has changed, and not for "
        f"the base as others have it. {remedy}"
    )


def of_config(config: Mapping[str, Any]) -> LoraConfig:
    """What scales depend on."""
    return LoraConfig.from_dict({key: config[key] for key in ("r", "lora_alpha", "use_rslora") if key in config})


def layer_of(key: str) -> str:
    """A layer's own name, from the key of one of its factors.

    >>> layer_of("base_model.model.experts.base_layer.gate.lora_A.weight")
    'experts.gate'
    """
    return key.removeprefix(PREFIX).rpartition(".lora_")[0].replace(_AROUND, "")


def _pair(a_key: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Pair:
    head, _, kind = a_key.rpartition("A")
    b_key = f"{head}B{kind}"
    if b_key not in weights:
        raise AdapterError(f"{source} has {a_key} and no {b_key}")
    rows, columns = weights[a_key].shape[0], weights[b_key].shape[1]
    layer = layer_of(a_key)
    # PEFT has the out_proj of an attention inside the wrapper of that, whose settings it shares.
    name = layer.removesuffix(".out_proj") if a_key.endswith(f"{_AROUND}.out_proj.lora_A.weight") else layer
    stacked = _parameters_of(name, config)
    readings = {_rank_and_alpha(each, config): stacked for each in stacked} or {_rank_and_alpha(name, config): (name,)}
    if len(readings) > 1:
        raise AdapterError(
            f"{source} adapts {' and '.join(stacked)} at ranks or scales of their own, and its file does not say which "
            "of its tensors is whose: merge it instead"
        )
    ((r, alpha), meant) = readings.popitem()
    if rows == r and r % columns == 0:
        return Pair(a_key, b_key, layer, meant, r, alpha, of_config(config).scaling(r, alpha), groups=r // columns)
    if stacked and rows == columns and rows % r == 0:
        return Pair(a_key, b_key, layer, meant, r, alpha, of_config(config).scaling(r, alpha), experts=rows // r)
    raise AdapterError(f"{source}: {a_key} is of rank {rows}, and its config gives {meant[0]} r={r}")


def _rank_and_alpha(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    plain = of_config(config)
    r = int(pattern_value(config.get("rank_pattern") or {}, name, plain.r))
    return r, pattern_value(config.get("alpha_pattern") or {}, name, plain.lora_alpha)


def _parameters_of(layer: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the adapted parameters that a module has, which ``target_parameters`` names by their ends.

    An entry without a dot may be of any module; it is of those that are not adapted as layers.
    """
    found = []
    for entry in config.get("target_parameters") or ():
        holder, _, parameter = entry.rpartition(".")
        held = layer == holder or layer.endswith(f".{holder}")
        if held if holder else not _is_target(layer, config):
            found.append(f"{layer}.{parameter}")
    return tuple(found)


def _is_target(layer: str, config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules") or ()
    return matches(targets, layer)
