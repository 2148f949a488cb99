"""What trains in a model, sorted by what it is: groups for optimizers, and which ``A`` belongs to which ``B``.

All by the layers that hold the parameters and their names, never by the order in which parameters come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.injection.state import lora_layers
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.embedding import LoraOverEmbedding

KINDS = ("A", "B", "magnitude", "embeddings", "vectors", "in_full")


def parameter_groups(model: nn.Module, **settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups for an optimizer, one for each kind of parameter that trains.

    ``A`` and ``B`` are the low-rank factors of all layers but embeddings, whose factors are ``embeddings``;
    ``magnitude`` is DoRA's; ``vectors`` are biases and norms, and ``in_full`` what else trains beside the adapter
    (``modules_to_save``, a head outside the adapted network).

    Args:
        model: An injected model, or a LightningModule around one.
        **settings: What the group of a kind says beside its parameters: ``B={"lr": 1e-3}``.

    Returns:
        A group for each kind of which something trains, in the order of the kinds, with the kind as its ``name``.

    Raises:
        LoraConfigError: If a kind is not one of these, or nothing trains.
    """
    if unknown := [kind for kind in settings if kind not in KINDS]:
        raise LoraConfigError(
            f"there is no kind of parameters called {unknown[0]!r}{did_you_mean(unknown[0], KINDS)}; the kinds are "
            f"{', '.join(KINDS)}"
        )
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    kinds = _kinds_of_adapters(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[kinds.get(id(parameter)) or _kind_of_other(parameter)].append(parameter)
    groups = [{"params": held, "name": kind, **settings.get(kind, {})} for kind, held in members.items() if held]
    if not groups:
        raise LoraConfigError(
            f"nothing trains in this {type(model).__name__}: build the optimizer in configure_optimizers, after "
            "injection"
        )
    return groups


@dataclass(frozen=True)
class Pair:
    """The two factors of the update ``s · B A`` of one weight: of each expert, or each group of a convolution, its own.

    Shapes: ``k`` updates of rank ``r``; it is 1 but for experts and grouped convolutions.

    Attributes:
        a: ``(k·r, in)``; of a convolution with the kernel's sizes behind it.
        b: ``(k·out, r)``; of experts ``(out, r·k)``, the expert changing fastest.
        scaling: The scale ``s``.
        experts: How many experts there are, or 1.
        is_embedding: Whether they are those of an embedding.
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    experts: int = 1
    is_embedding: bool = False

    def a_matrices(self, a: Tensor) -> Tensor:
        """``(k, r, in)`` of a factor, or of what has its shape, in float32 at least."""
        return _exact(a).reshape(self._count, -1, self.a[0].numel())

    def b_matrices(self, b: Tensor) -> Tensor:
        """``(k, out, r)``, likewise."""
        rows = _exact(b)
        if self.experts > 1:
            return rows.view(len(rows), -1, self.experts).permute(2, 0, 1)
        return rows.reshape(self._count, -1, rows.shape[1])

    def as_b(self, matrices: Tensor) -> Tensor:
        """``(k, out, r)`` in the shape of ``b``."""
        if self.experts > 1:
            matrices = matrices.permute(1, 2, 0)
        return matrices.reshape(self.b.shape)

    @property
    def _count(self) -> int:
        return self.experts if self.experts > 1 else len(self.a) // self.b.shape[1]


def pairs(model: nn.Module) -> dict[str, Pair]:
    """Every pair of factors in a model, by the canonical name of its ``A``.

    Raises:
        LoraConfigError: If there is none.
    """
    found = {
        f"{name}.{part}": Pair(
            a, b, layer.lora_scaling, getattr(layer, "lora_experts", 1), isinstance(layer, LoraOverEmbedding)
        )
        for name, layer in lora_layers(model)
        for part, a, b in _factors(layer)
    }
    if not found:
        raise LoraConfigError(
            f"this {type(model).__name__} has no adapter, and the optimizer is one of adapters: build it in "
            "configure_optimizers, after injection"
        )
    return found


def pairs_that_train(model: nn.Module) -> list[Pair]:
    """The pairs of which both factors train: only such can be stepped on together.

    Raises:
        LoraConfigError: If there is none, so that nothing would set the optimizer apart from a plain one.
    """
    found = pairs(model).values()
    trained = [pair for pair in found if pair.a.requires_grad and pair.b.requires_grad]
    if not trained:
        raise LoraConfigError(
            f"this optimizer steps on A and B together, and of {len(found)} pairs in this {type(model).__name__} none "
            "trains both: init_lora_weights='mica' trains A alone, lora_fa B alone, and finetuning callbacks freeze "
            "what is to train later. Take optimizer=adamw or lora_plus, or a start that trains both"
        )
    return trained


def _factors(layer: LoraLayer) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    own = layer.lora_own
    for part, a in own.items():
        b = own.get(part.replace("lora_A", "lora_B"))
        if "lora_A" in part and b is not None:
            yield part, a, b


def _kinds_of_adapters(model: nn.Module) -> dict[int, str]:
    return {
        id(parameter): kind
        for _, layer in lora_layers(model)
        for part, parameter in layer.lora_own.items()
        if (kind := _kind_of(layer, part, parameter)) is not None
    }


def _kind_of(layer: LoraLayer, part: str, parameter: Tensor) -> str | None:
    if "magnitude" in part:
        return "magnitude"
    if parameter.ndim < 2 or not ("lora_A" in part or "lora_B" in part):
        return None  # a bias on B, or what else a kind of layer trains
    if isinstance(layer, LoraOverEmbedding):
        return "embeddings"
    return "A" if "lora_A" in part else "B"


def _kind_of_other(parameter: Tensor) -> str:
    return "in_full" if parameter.ndim > 1 else "vectors"


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))
