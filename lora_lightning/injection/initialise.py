"""First values of an adapter: functions of a layer and a generator, one for each ``init_lora_weights``.

The generator is seeded by the run's seed and the layer's name alone, so that an adapter starts the same on every
rank, under every strategy and in whatever order layers are visited; torch's global generator is not touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from lora_lightning.layers import LoraLayer
from lora_lightning.layers.embedding import LoraOverEmbedding

__all__ = ["INITIALISERS", "generator_for", "initialise"]


def generator_for(seed: int, name: str) -> Generator:
    """A CPU generator for one layer, from the seed and the layer's canonical name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(layer: LoraLayer, how: bool | str, generator: Generator) -> None:
    """Fill ``lora_A`` and ``lora_B`` as ``init_lora_weights`` says, and what follows from them; nothing on meta."""
    if layer.lora_A.is_meta:
        return
    values = INITIALISERS[how](layer, generator)
    for parameter, value in zip((layer.lora_A, layer.lora_B), values, strict=True):
        if type(parameter) is nn.Parameter and parameter.device == value.device and parameter.dtype == value.dtype:
            parameter.data = value.contiguous()  # as drawn, without a copy
        else:
            with torch.no_grad():
                parameter.copy_(value)
    with torch.no_grad():
        for name, value in layer.lora_derived().items():
            layer.lora_own[name].copy_(value)


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


INITIALISERS: dict[bool | str, Callable[[LoraLayer, Generator], tuple[Tensor, Tensor]]] = {
    True: _default,
    False: _random,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}
