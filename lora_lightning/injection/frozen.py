"""What injection freezes although it looks meant to train: found beforehand, so that people can be told."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from lora_lightning.injection.names import canonical_modules, parameters_of
from lora_lightning.injection.targets import output_embeddings
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.tokens import TokenRows


def meant_to_train(
    model: nn.Module, root: nn.Module, in_full: Iterable[nn.Module]
) -> tuple[tuple[str, ...], dict[str, nn.Parameter]]:
    """What looks meant to train although the config does not name it, as ``modules_to_save`` would.

    In a model that is trainable as a whole this is what lies beside the transformers backbone: a fresh head, or layers
    of the LightningModule around it. In one that was frozen in part, all that was left trainable.

    Returns:
        Names of modules, and trainable parameters that lie in no module that could be named, by canonical name: they
        are held directly by a module that holds others too, such as the LightningModule around a network, so that
        ``modules_to_save`` would train those others with them.
    """
    network = _network(root)
    known = _parts(output_embeddings(root)).union(network, *map(_parts, in_full))
    found = _topmost(root, known)
    if root is not model:
        found += _topmost(model, known | _parts(root))
    heads = tuple(dict.fromkeys(found))
    return heads, _bare_parameters(model, root, network, heads)


def _bare_parameters(
    model: nn.Module, root: nn.Module, network: set[int], heads: Iterable[str]
) -> dict[str, nn.Parameter]:
    if callable(getattr(root, "training_step", None)):
        network = network - {id(root)}  # a LightningModule is never itself the pretrained network
    outer = tuple(f"{name}." for name in heads)
    return {
        f"{name}.{local}".removeprefix("."): parameter
        for name, module in canonical_modules(model)
        if id(module) not in network and not isinstance(module, LoraLayer) and any(module.children())
        for local, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not f"{name}.".startswith(outer)
    }


def warn_of_bare(parameters: Mapping[str, nn.Parameter]) -> None:
    """Name those that are frozen now, with what would let them train."""
    if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
        warnings.warn(
            f"LoRA froze {', '.join(frozen)}, held by no module of its own, so that modules_to_save cannot name it. To "
            "train such a parameter and save it with the adapter, put it into an nn.ParameterDict (or an nn.Module of "
            "its own) and name that in modules_to_save",
            stacklevel=4,
        )


def _network(root: nn.Module) -> set[int]:
    """The parts of a model that is trainable as a whole, less what is beside the transformers backbone in it."""
    if not all(parameter.requires_grad for parameter in parameters_of(root)):
        return set()
    return _parts(getattr(root, str(getattr(root, "base_model_prefix", "")), root) or root)


def _parts(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(part) for part in module.modules()}


def _topmost(model: nn.Module, known: set[int]) -> list[str]:
    """Outermost modules with trainable, not yet adapted parameters, none of whose parts is known."""
    verdicts: dict[int, tuple[bool, bool]] = {}

    def verdict(module: nn.Module) -> tuple[bool, bool]:
        """Whether nothing in a module is known and all of it trains, and whether it has parameters at all."""
        if id(module) not in verdicts:
            own = [parameter for parameter in module._parameters.values() if parameter is not None]
            parts = [verdict(child) for child in module._modules.values() if child is not None]
            fresh = id(module) not in known and not isinstance(module, (LoraLayer, TokenRows))
            trains = fresh and all(p.requires_grad for p in own) and all(each for each, _ in parts)
            verdicts[id(module)] = trains, bool(own) or any(some for _, some in parts)
        return verdicts[id(module)]

    found: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in canonical_modules(model):
        if name and not name.startswith(inside) and verdict(module) == (True, True):
            found.append(name)
            inside += (f"{name}.",)
    return found
