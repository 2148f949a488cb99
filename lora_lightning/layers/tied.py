"""A head that is tied to an adapted embedding, and has its adapter: the same two matrices the other way round."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.embedding import LoraOverEmbedding
from lora_lightning.layers.hazards import detached_hook
from lora_lightning.layers.linear import LoraOverLinear
from lora_lightning.layers.made import made_class


class LoraTied(LoraOverLinear):
    """A linear head with ``A = B_embᵀ (r, dim)`` and ``B = A_embᵀ (vocabulary, r)`` of the embedding it is tied to.

    It has no parameters of its own, so that the one weight of both has one update, ``s · (B_emb A_emb)ᵀ``, and one
    gradient.

    Attributes:
        lora_source: The adapted embedding.
        lora_source_name: Its canonical name below the root.
    """

    lora_parameter_names: ClassVar[tuple[str, ...]] = ()
    lora_source: LoraOverEmbedding
    lora_source_name: str

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """``(r, dim)``."""
        return self.lora_source.lora_B.t()

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """``(vocabulary, r)``."""
        return self.lora_source.lora_A.t()

    def lora_meant(self, name: str) -> str:
        """The embedding's name, after which rank and scale go."""
        return self.lora_source_name


def adapt_tied(head: nn.Module, source: LoraLayer, name: str, dropout: float) -> None:
    """Give a plain head the adapter of the embedding that it is tied to.

    Args:
        head: An ``nn.Linear``.
        source: The adapted embedding.
        name: Its canonical name below the root.
        dropout: Probability of dropping an input of the head's ``A`` in training.
    """
    with detached_hook(head):
        head.__dict__.update(
            lora_r=source.lora_r,
            lora_alpha=source.lora_alpha,
            lora_scaling=source.lora_scaling,
            lora_dropout=dropout,
            lora_enabled=True,
            lora_source=cast("LoraOverEmbedding", source),
            lora_source_name=name,
        )
        head.__class__ = made_class(LoraTied, type(head))  # type: ignore[assignment]
