"""Adapters that begin as batches of data show: EVA, CorDA and LoRA-GA over an injected model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import settings_of
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.initialise import derive, generator_for, set_values
from lora_lightning.injection.inject import freeze_base, report_of
from lora_lightning.injection.matching import matches
from lora_lightning.injection.names import canonical_modules, unwrap
from lora_lightning.injection.report import LoraReport
from lora_lightning.injection.starts.corda import corda, covariances
from lora_lightning.injection.starts.decompositions import Start
from lora_lightning.injection.starts.eva import eva
from lora_lightning.injection.starts.hindrances import refuse_other_stack
from lora_lightning.injection.starts.lora_ga import gradients, lora_ga
from lora_lightning.injection.starts.ranks import with_ranks
from lora_lightning.injection.starts.residual import oriented, take_out_start
from lora_lightning.injection.state import lora_layers, record_of, the_root
from lora_lightning.injection.tensors import whole
from lora_lightning.injection.unload import lora_disabled
from lora_lightning.layers import LoraLayer, is_linear


@dataclass
class Shown:
    """What data have shown of an adapter's start, in host memory: the same for every process that is to begin alike.

    Attributes:
        values: ``A (r, in)`` and, unless it is zero, ``B (out, r)`` of layers by name below the root.
        config: The config with the ranks and alphas that layers have now.
    """

    values: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    config: LoraConfig = field(default_factory=LoraConfig)


def initialise_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any], Tensor] | None = None,
) -> LoraReport:
    """Begin an adapter of ``init_lora_weights`` ``"eva"``, ``"corda"`` or ``"lora_ga"`` as batches of data show.

    Call it after :func:`inject_lora` and before training, once. ``LoraCallback`` does so by itself. The same batches
    on every process begin equal adapters.

    Args:
        model: An injected model, or a LightningModule around one.
        batches: What ``model`` is called with, on its device: mappings (as keyword arguments), tuples (as positional
            ones), or tensors. At most as many are taken as the settings of the start say (``batches``).
        loss: Gives the loss of a batch, for LoRA-GA; the others run it as well, if it is given. None calls the model,
            and takes the ``loss`` of its output.

    Returns:
        What is adapted now: EVA deals ranks anew, and may leave layers without an adapter.

    Raises:
        LoraConfigError: If the config's start looks at no data, or the data do not suffice.
        AdapterError: If the model has no adapter.
    """
    begin_as_shown(model, look_at_data(model, batches, loss=loss))
    return report_of(model)


def look_at_data(model: nn.Module, batches: Iterable[Any], *, loss: Callable[[Any], Tensor] | None = None) -> Shown:
    """What batches show, for :func:`begin_as_shown`; the model is as it was afterwards."""
    model = unwrap(model)
    root = the_root(model)[1]
    record = record_of(root)
    how, settings = record.config.init_lora_weights, settings_of(record.config)
    if how not in _METHODS:
        raise LoraConfigError(f"init_lora_weights={how!r} looks at no data: it is one of {', '.join(_METHODS)} that do")
    refuse_other_stack(record.config)
    if not record.awaits_data:
        raise LoraConfigError("this adapter has begun already: data are looked at once, before it trains")
    layers = {name: layer for name, layer in lora_layers(root) if is_linear(layer) and layer.lora_own}
    run = loss if loss is not None else lambda batch: _loss_of(model, batch)
    forward = loss if loss is not None else lambda batch: _called(model, batch)
    seen = itertools.islice(batches, settings["batches"])
    learns = how == "lora_ga"
    with lora_disabled(model), _mode(model, training=learns), torch.set_grad_enabled(learns):
        return _METHODS[str(how)](model, layers, seen, run if learns else forward)


@torch.no_grad()
def begin_as_shown(model: nn.Module, shown: Shown) -> None:
    """Give an adapter the values, and its layers the ranks, that data have shown."""
    root = the_root(unwrap(model))[1]
    record = record_of(root)
    if shown.config.difference(record.config):
        with_ranks(root, shown.config)
    for name, layer in lora_layers(root):
        if name in shown.values:
            a, b = shown.values[name]
            set_values(layer, a, torch.zeros(layer.lora_B.shape) if b is None else b)
            if b is not None:
                take_out_start(layer, a, b)
        derive(layer)
    record.awaits_data = False
    freeze_base(root)  # what lies around it may have been left to train


def _eva(
    model: nn.Module, layers: dict[str, LoraLayer], batches: Iterator[Any], forward: Callable[[Any], Any]
) -> Shown:
    root = the_root(model)[1]
    record = record_of(root)
    config, settings = record.config, settings_of(record.config)
    ranks = {name: layer.lora_r for name, layer in layers.items()}
    sides = {name: layer.lora_sides(layer)[0] for name, layer in layers.items()}
    found = eva(layers, ranks, sides, settings, batches, forward)
    new = {name: len(a) for name, a in found.items()}
    alphas = {
        name: layer.lora_alpha * (new[name] / layer.lora_r if settings["adjust_scaling_factors"] else 1)
        for name, layer in layers.items()
    }
    for name, layer in lora_layers(root):  # embeddings keep theirs, and a head that is tied to one follows it
        if layer.lora_own:
            new.setdefault(name, layer.lora_r)
            alphas.setdefault(name, layer.lora_alpha)
    values: dict[str, tuple[Tensor, Tensor | None]] = {name: (a.cpu(), None) for name, a in found.items()}
    return Shown(values, _dealt(root, config, new, alphas))


def _dealt(root: nn.Module, config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """The config that gives each layer its rank and alpha, and layers of rank 0 none."""
    kept = [name for name, r in ranks.items() if r]
    changes: dict[str, Any] = {
        "rank_pattern": {_key(name, kept): ranks[name] for name in kept if ranks[name] != config.r},
        "alpha_pattern": {_key(name, kept): alphas[name] for name in kept if alphas[name] != config.lora_alpha},
    }
    if len(kept) < len(ranks):
        named = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        mistaken = any(name not in kept and matches(kept, name) for name, _ in canonical_modules(root))
        # A list as short as PEFT would make it is made when the adapter is saved.
        targets = "|".join(name.replace(".", r"\.") for name in kept) if mistaken else kept
        changes |= {"target_modules": targets, **named}
    return replace(config, **changes)


def _key(name: str, names: list[str]) -> str:
    """A name as a pattern that no other name matches: patterns are looked for at the end of a name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _corda(
    model: nn.Module, layers: dict[str, LoraLayer], batches: Iterator[Any], forward: Callable[[Any], Any]
) -> Shown:
    config = record_of(the_root(model)[1]).config
    settings = settings_of(config)
    method = settings["corda_method"]
    found = covariances(layers, settings, batches, forward)
    starts = {
        name: corda(_matrix(layer, layer.weight), found[name], layer.lora_r, layer.lora_scaling, method)
        for name, layer in layers.items()
    }
    return Shown(_on_host(starts), config)


def _lora_ga(
    model: nn.Module, layers: dict[str, LoraLayer], batches: Iterator[Any], loss: Callable[[Any], Tensor]
) -> Shown:
    record = record_of(the_root(model)[1])
    settings = settings_of(record.config)
    found = gradients(model, layers, batches, loss)
    starts = {
        name: lora_ga(
            _matrix(layer, found[name].to(layer.weight.device)),
            _matrix(layer, layer.weight),
            layer.lora_r,
            layer.lora_scaling,
            settings,
            generator_for(record.seed, name),
        )
        for name, layer in layers.items()
        if name in found
    }
    return Shown(_on_host(starts), record.config)


_METHODS: dict[str, Callable[..., Shown]] = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}


def _on_host(starts: Mapping[str, Start]) -> dict[str, tuple[Tensor, Tensor | None]]:
    return {name: (a.detach().cpu(), b.detach().cpu()) for name, (a, b) in starts.items()}


def _matrix(layer: LoraLayer, value: Tensor) -> Tensor:
    """A layer's weight, or what has its shape, as ``(out, in)`` in float32 at least."""
    value = whole(value.detach())
    return oriented(layer, value.to(torch.promote_types(value.dtype, torch.float32)))


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    out = _called(model, batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(found, Tensor):
        raise LoraConfigError(
            f"init_lora_weights='lora_ga' needs a loss, and {type(model).__name__} gives none: have labels in the "
            "batches, or pass loss=, a function of a batch"
        )
    return found


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """All modules in one mode, and afterwards each in its own; draws of dropout leave no trace."""
    before = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train(training)
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()  # its running statistics are of the base
        try:
            yield
        finally:
            for module, was in before.items():
                module.training = was
