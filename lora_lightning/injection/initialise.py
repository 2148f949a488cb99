"""First values of an adapter: functions of a layer and a generator, one for each ``init_lora_weights``.

Those that look at the base's weight are in ``starts``, and so are those that look at data: these begin as by default
until they have seen some. The generator is seeded by the run's seed and the layer's name alone, so that an adapter
starts the same on every rank, under every strategy and in whatever order layers are visited; torch's global generator
is not touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from lora_lightning.config import LoraConfig
from lora_lightning.config_starts import DATA_DRIVEN, PISSA_NITER, changes_base, settings_of, start_of
from lora_lightning.injection.starts.decompositions import mica, olora, pissa
from lora_lightning.injection.starts.loftq import loftq
from lora_lightning.injection.starts.residual import (
    add_starts,
    oriented,
    replace_weight,
    take_out_start,
)
from lora_lightning.injection.tensors import spread_like, whole
from lora_lightning.layers import LoraLayer, is_linear
from lora_lightning.layers.embedding import LoraOverEmbedding

__all__ = ["first_values", "generator_for", "initialise", "prepare", "set_values"]


def generator_for(seed: int, name: str) -> Generator:
    """A CPU generator for one layer, from the seed and the layer's canonical name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def prepare(layer: LoraLayer, config: LoraConfig) -> None:
    """What a start needs of a layer beside ``A`` and ``B``, whoever gives the values."""
    start = start_of(config.init_lora_weights)
    if changes_base(start) and start != "loftq":
        add_starts(layer)
    if start == "mica" and (is_linear(layer) or isinstance(layer, LoraOverEmbedding)):
        vars(layer)["lora_still"] = ("lora_B",)


def initialise(layer: LoraLayer, config: LoraConfig, generator: Generator) -> None:
    """Fill ``lora_A`` and ``lora_B`` as ``init_lora_weights`` says, and what follows from them; nothing on meta.

    A start that takes its values out of the base's weight changes it, so that outputs stay what they were.
    """
    if layer.lora_A.is_meta:
        return
    set_values(layer, *first_values(layer, config, generator))
    derive(layer)


@torch.no_grad()
def set_values(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Give a layer's ``lora_A`` and ``lora_B`` values that every process has whole."""
    for parameter, value in ((layer.lora_A, a), (layer.lora_B, b)):
        if type(parameter) is nn.Parameter and parameter.device == value.device and parameter.dtype == value.dtype:
            parameter.data = value.contiguous()  # as drawn, without a copy
        else:
            parameter.copy_(spread_like(value, parameter))


@torch.no_grad()
def derive(layer: LoraLayer) -> None:
    """Give what follows from the weight, ``A`` and ``B`` its values."""
    for name, value in layer.lora_derived().items():
        layer.lora_own[name].copy_(value)


@torch.no_grad()
def first_values(layer: LoraLayer, config: LoraConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """``A (r, in)`` and ``B (out, r)`` as a layer begins, whole on every process; its base is changed where they ask.

    Embeddings begin as by default under the starts that are for linear layers, as in PEFT.
    """
    how = start_of(config.init_lora_weights)
    if how in _DRAWN:
        return _DRAWN[how](layer, generator)
    of_weight = is_linear(layer) or (how == "mica" and isinstance(layer, LoraOverEmbedding))
    if how in DATA_DRIVEN or not of_weight:
        return _default(layer, generator)
    weight = whole(layer.weight.detach())
    weight = oriented(layer, weight.to(torch.promote_types(weight.dtype, torch.float32)))
    r, scaling, settings = layer.lora_r, layer.lora_scaling, settings_of(config)
    if how == "mica":
        return mica(weight, r)
    if how == "loftq":
        quantised, a, b = loftq(weight, r, scaling, settings["loftq_bits"], settings["loftq_iter"])
        replace_weight(layer, quantised)
        return a, b
    if how == "pissa":
        fast = PISSA_NITER.fullmatch(str(config.init_lora_weights))
        a, b = pissa(weight, r, scaling, int(fast[1]) if fast else None, generator)
    else:
        a, b = olora(weight, r)
    take_out_start(layer, a, b)
    return a, b


def _default(layer: LoraLayer, generator: Generator) -> tuple[Tensor, Tensor]:
    """``A`` Kaiming-uniform with a = √5 (uniform within ±1/√in), ``B`` zero; embeddings ``A`` zero, ``B`` normal."""
    if isinstance(layer, LoraOverEmbedding):
        return torch.zeros(layer.lora_A.shape), _normal(layer.lora_B.shape, generator)
    return _uniform(layer.lora_A.shape, generator), torch.zeros(layer.lora_B.shape)


def _gaussian(layer: LoraLayer, generator: Generator) -> tuple[Tensor, Tensor]:
    """``A`` normal with standard deviation 1/r, ``B`` zero; embeddings as by default."""
    if isinstance(layer, LoraOverEmbedding):
        return _default(layer, generator)
    return _normal(layer.lora_A.shape, generator) / layer.lora_r, torch.zeros(layer.lora_B.shape)


def _random(layer: LoraLayer, generator: Generator) -> tuple[Tensor, Tensor]:
    """Both random: the adapter changes the output from the start (for tests of everything but training)."""
    draw = _normal if isinstance(layer, LoraOverEmbedding) else _uniform
    return draw(layer.lora_A.shape, generator), draw(layer.lora_B.shape, generator)


def _orthogonal(layer: LoraLayer, generator: Generator) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` over the odd and the even rows of one orthogonal matrix, so that ``B A`` is zero and neither is.

    Source: datta0.github.io/posts/rethink-lora-init, as in PEFT.
    """
    if isinstance(layer, LoraOverEmbedding):
        return _default(layer, generator)
    r, n_in, n_out = layer.lora_r, layer.lora_A.shape[1], layer.lora_B.shape[0]
    q, _ = torch.linalg.qr(_normal((r, r), generator))
    a = (_normal((n_in, r // 2), generator) @ q[0::2]).t() / 10.0
    b = (_normal((n_out, r // 2), generator) @ q[1::2]) / 10.0
    return a, b


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    # Told, since contexts that models are built in (precision, zero.Init) change the defaults.
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    return drawn.mul_(2).sub_(1).div_(math.sqrt(math.prod(shape[1:])))


_DRAWN: dict[bool | str, Callable[[LoraLayer, Generator], tuple[Tensor, Tensor]]] = {
    True: _default,
    False: _random,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}
