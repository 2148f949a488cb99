"""Which rows of which embeddings train: ``trainable_token_indices``, with PEFT's meanings.

To add tokens to a vocabulary, give them to the tokenizer and a row each to the model, before anything is injected::

    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer))
    new = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    inject_lora(model, LoraConfig(trainable_token_indices=new))

Only those rows train and are saved. A model that loads such an adapter has to be resized in the same way before; what
it has in the new rows does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.errors import did_you_mean
from lora_lightning.injection.matching import matches
from lora_lightning.layers.base import COMPUTED_IN
from lora_lightning.layers.hazards import why_not
from lora_lightning.layers.tokens import TokenEmbedding, TokenLinear


@dataclass(frozen=True)
class TokenTarget:
    """A layer some of whose rows train.

    Attributes:
        name: Canonical name.
        layer: An embedding, or a head.
        tokens: Numbers of the rows.
        followers: Layers that are tied to it, by canonical name.
    """

    name: str
    layer: nn.Module
    tokens: list[int]
    followers: dict[str, nn.Module] = field(default_factory=dict)


def tokens_meant(
    root: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, taken: Collection[int], problems: list[str]
) -> list[TokenTarget]:
    """Find the layers that ``trainable_token_indices`` names, and those that follow them.

    Args:
        root: The model, whose input embedding a plain list is for.
        modules: All modules by canonical name.
        config: The config.
        taken: Ids of modules that are trained in full or adapted.
        problems: Gets a line for each thing that cannot be done.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    named: dict[str, list[int]] = {}
    for entry, tokens in (wanted if isinstance(wanted, dict) else _for_input(root, modules, wanted)).items():
        hits = [name for name in modules if name and matches([entry], name)]
        if not hits:
            problems.append(f"trainable_token_indices: {entry!r} matches nothing{_near(entry, modules)}")
        named.update(dict.fromkeys(hits, tokens))
    found: list[TokenTarget] = []
    source = input_name(root, modules)
    for name in sorted(named, key=lambda name: name != source):  # the input embedding before what may be tied to it
        if any(name in target.followers for target in found):
            continue
        tied = tied_to(root, modules, name)
        others = {other: modules[other] for other in tied if named.get(other, named[name]) == named[name]}
        if parted := [other for other in tied if other not in others]:
            if config.ensure_weight_tying:
                problems.append(
                    f"trainable_token_indices: {name} and {', '.join(parted)} are tied, and have different tokens; "
                    "ensure_weight_tying wants the same for all"
                )
            others = {}  # as PEFT: then nothing follows
        found.append(TokenTarget(name, modules[name], named[name], others))
    for target in found:
        problems += _hindrances(target, taken)
    if config.ensure_weight_tying and not any(target.followers for target in found):
        warnings.warn("ensure_weight_tying: nothing is tied to the embedding whose tokens train", stacklevel=6)
    return found


def tied_to(root: nn.Module, modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Names of the other layers that have a layer's weight; those of a model whose config says that they are tied."""
    weight = modules[name]._parameters.get("weight")
    if weight is None:
        return []
    tied = [other for other, module in modules.items() if other != name and module._parameters.get("weight") is weight]
    ends = [getattr(root, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    if getattr(getattr(root, "config", None), "tie_word_embeddings", False) and modules[name] in ends:
        # Tied, even where a parallel plan has given the head a tensor of its own.
        tied += [other for other, module in modules.items() if module in ends and other not in (name, *tied)]
    return tied


def _for_input(root: nn.Module, modules: Mapping[str, nn.Module], tokens: list[int]) -> dict[str, list[int]]:
    return {input_name(root, modules) or "embed_tokens": tokens}


def input_name(root: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """The canonical name of a transformers model's input embedding."""
    get: Any = getattr(root, "get_input_embeddings", None)
    embeddings = get() if callable(get) else None
    return next((name for name, module in modules.items() if module is embeddings), None)


def _hindrances(target: TokenTarget, taken: Collection[int]) -> list[str]:
    problems = []
    for name, layer in {target.name: target.layer, **target.followers}.items():
        what = f"trainable_token_indices: the tokens of {name} cannot train: "
        weight = layer._parameters.get("weight")
        if isinstance(layer, (TokenEmbedding, TokenLinear)):
            continue  # they do already
        if id(layer) in taken:
            problems.append(f"{what}it is adapted (target_modules) or trained in full (modules_to_save) as a whole")
        elif not isinstance(layer, (nn.Embedding, nn.Linear)) or weight is None or weight.dtype not in COMPUTED_IN:
            problems.append(f"{what}it is a {type(layer).__name__}, and an embedding or a linear head is wanted")
        elif (reason := why_not(layer)) is not None:
            problems.append(what + reason)
        elif weight.numel() == 0:
            problems.append(f"{what}its weight is split over processes (ZeRO-3): inject before that")
        elif max(target.tokens) >= weight.shape[0]:
            problems.append(
                f"{what}it has {weight.shape[0]} rows, and {max(target.tokens)} is asked for; for new tokens call "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
    return problems


def _near(entry: str, modules: Mapping[str, nn.Module]) -> str:
    embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    near = did_you_mean(entry, {name.rpartition(".")[2] for name in embeddings})
    return f"{near}. Embeddings in this model: {', '.join(embeddings[:8]) or 'none'}"
