"""Rows of an embedding that train while the rest of it stays frozen, and a head that is tied to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.layers.base import adapter_dtype
from lora_lightning.layers.hazards import detached_hook
from lora_lightning.layers.holder import LoraHolder, Showing, follow, hold, let_go, parts_of

CHILD = "token_adapter"
ROWS = "trainable_tokens_delta"


class TokenRows(Showing, nn.Module):
    """Rows that take the place of some rows of a weight ``(vocabulary, dim)``, as a child of the layer that has it.

    They are the rows themselves and not a difference, so that it does not matter what a resized embedding has in new
    rows when the adapter is loaded (as in PEFT, whose names these are).

    Attributes:
        trainable_tokens_delta: ``(n, dim)``, in the order of ``lora_tokens``.
        lora_tokens: The numbers of the rows.
        lora_holder: The layer that has the weight.
        lora_followers: Layers tied to it, which see the same rows.
    """

    trainable_tokens_delta: nn.Parameter
    lora_index: Tensor
    lora_order: Tensor
    lora_tokens: list[int]
    lora_holder: nn.Module
    lora_followers: list[nn.Module]

    def __init__(self, holder: nn.Module, tokens: Sequence[int], followers: Sequence[nn.Module] = ()) -> None:
        """Begin with the weight's own rows."""
        super().__init__()
        vars(self).update(lora_holder=holder, lora_tokens=list(tokens), lora_followers=list(followers))
        vars(self).update(lora_parameter="weight", lora_enabled=True)
        there = torch.device("cpu") if self.weight.is_meta else self.weight.device
        index = torch.tensor(self.lora_tokens, device=there)
        self.register_buffer("lora_index", index, persistent=False)
        self.register_buffer("lora_order", index.argsort(), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(self.lora_base_rows().to(adapter_dtype(self.weight)))

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return cast("Tensor", self.lora_holder.weight)

    @property
    def lora_own(self) -> dict[str, nn.Parameter]:
        """The rows by name."""
        return {ROWS: self.trainable_tokens_delta}

    def lora_base_rows(self) -> Tensor:
        """The base's own rows, ``(n, dim)``."""
        weight = self.weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return weight[self.lora_index.to(weight.device)].clone()

    def lora_find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have a row here, and which: ``(...)`` each; where there is none, the row means nothing."""
        order = self.lora_order.to(tokens.device)
        ordered = self.lora_index.to(tokens.device)[order]
        place = torch.searchsorted(ordered, tokens).clamp_(max=len(ordered) - 1)
        return ordered[place] == tokens, order[place]

    def lora_value(self, weight: Tensor) -> Tensor:
        """``(vocabulary, dim)``: the weight with these rows in it."""
        index = self.lora_index.to(weight.device)
        return weight.index_copy(0, index, self.trainable_tokens_delta.to(weight.dtype))

    # ---- merging, as of a LoraLayer

    @property
    def lora_folds(self) -> tuple[str, ...]:
        """The weight, and what is tied to it."""
        return ("weight", *(f"weight.{number}" for number in range(len(self.lora_followers))))

    def lora_place(self, name: str) -> tuple[nn.Module, str]:
        """The layer that has the weight, or one that is tied to it."""
        _, _, number = name.partition(".")
        return (self.lora_followers[int(number)] if number else self.lora_holder), "weight"

    def lora_delta_of(self, name: str) -> Tensor:
        """``(vocabulary, dim)``: what the rows differ by from the base's, and zero elsewhere."""
        base = self.lora_base_rows().to(self.trainable_tokens_delta)
        delta = torch.zeros_like(self.weight, dtype=base.dtype, requires_grad=False)
        return delta.index_copy(0, self.lora_index.to(delta.device), self.trainable_tokens_delta - base)

    def lora_unmergeable(self) -> str | None:
        """Nothing is in the way."""
        return None

    def lora_base_value(self, name: str) -> Tensor:
        """The weight."""
        module, local = self.lora_place(name)
        return cast("Tensor", module._parameters[local])

    def lora_write(self, name: str, value: Tensor) -> None:
        """Give the weight a value, rounded once."""
        self.lora_base_value(name).detach().copy_(value)

    def lora_keep(self, name: str) -> Callable[[], object]:
        """What puts the weight back as it is now, to the bit; its copy lies in host memory."""
        target = self.lora_base_value(name).detach()
        here = target.to_local() if isinstance(target, DTensor) else target
        return functools.partial(here.copy_, here.to("cpu", copy=True))

    def lora_merged(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The rows themselves, not what a sum rounds them to."""
        return self.lora_value(weight)

    def extra_repr(self) -> str:
        """How many rows."""
        return f"{len(self.lora_tokens)} tokens"


class TokenEmbedding(LoraHolder):
    """``nn.Embedding`` with rows that train: those are looked up where they belong, and the weight is never copied."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Token numbers ``(...)`` to ``(..., dim)``."""
        rows = cast("TokenRows", next(parts_of(self)))
        if not rows.lora_enabled:
            return super(LoraHolder, self).forward(*args, **kwargs)
        if not _looks_up(self, rows):
            return super().forward(*args, **kwargs)
        out = super(LoraHolder, self).forward(*args, **kwargs)
        here, row = rows.lora_find(args[0] if args else kwargs["input"])
        return torch.where(here.unsqueeze(-1), F.embedding(row, rows.trainable_tokens_delta).to(out.dtype), out)


class TokenLinear(LoraHolder):
    """``nn.Linear`` some of whose outputs have rows that train: a head, ``(..., dim) -> (..., vocabulary)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's outputs, with those of the rows in their places."""
        rows = cast("TokenRows", next(parts_of(self)))
        if not rows.lora_enabled:
            return super(LoraHolder, self).forward(*args, **kwargs)
        if not _plain_forward(self, nn.Linear):
            return super().forward(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        out = super(LoraHolder, self).forward(x)
        index = rows.lora_index.to(out.device)
        bias = cast("nn.Linear", self).bias
        mine = F.linear(x, rows.trainable_tokens_delta.to(x.dtype), None if bias is None else bias[index])
        return out.index_copy(-1, index, mine.to(out.dtype))


def _plain_forward(layer: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a layer's own class leaves the forward of a known class as it is."""
    after = type(layer).__mro__[type(layer).__mro__.index(LoraHolder) + 1 :]
    return next(kind.forward for kind in after if "forward" in vars(kind)) is known.forward  # type: ignore[attr-defined]


def _looks_up(layer: nn.Module, rows: TokenRows) -> bool:
    """Whether an embedding only looks rows up; else it is shown a whole weight, of which it makes what it makes."""
    embedding = cast("nn.Embedding", layer)
    return (
        _plain_forward(layer, nn.Embedding)
        and embedding.max_norm is None
        and embedding.padding_idx not in rows.lora_tokens
        and not (embedding.scale_grad_by_freq or embedding.sparse)
    )


def train_tokens(layer: nn.Module, tokens: Sequence[int], followers: Sequence[nn.Module] = ()) -> TokenRows:
    """Let some rows of an embedding (or of a head) train.

    Args:
        layer: An ``nn.Embedding`` or ``nn.Linear``, or a subclass.
        tokens: Numbers of the rows.
        followers: Layers that are tied to it.
    """
    rows = TokenRows(layer, tokens, followers)
    with detached_hook(layer):
        hold(layer, CHILD, rows, _over(layer))
    for follower in followers:
        with detached_hook(follower):
            follow(follower, rows, _over(follower))
    return rows


def restore_tokens(rows: TokenRows) -> None:
    """Leave an embedding, and what follows it, with the base's rows."""
    for layer in (rows.lora_holder, *rows.lora_followers):
        with detached_hook(layer):
            let_go(layer, rows)


def _over(layer: nn.Module) -> type[LoraHolder]:
    return TokenEmbedding if isinstance(layer, nn.Embedding) else TokenLinear
