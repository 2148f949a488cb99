"""Adapted ``nn.Embedding``."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer


class LoraOverEmbedding(LoraLayer):
    """Adapter over a subclass of ``nn.Embedding`` that has a forward of its own.

    A class that multiplies its rows by an ``embed_scale`` (Gemma's) multiplies the update by it too, so that the
    merged weight means the same.
    """

    lora_kind = "Embedding"
    lora_base_class = nn.Embedding
    padding_idx: int | None
    scale_grad_by_freq: bool

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        embedding = cast("nn.Embedding", layer)
        return embedding.num_embeddings, embedding.embedding_dim

    def lora_delta(self, x: Tensor) -> Tensor:
        """``s · A[:, x]ᵀ Bᵀ``: token numbers ``(...)`` to ``(..., dim)``. There is no dropout on token numbers."""
        rows = F.embedding(x, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        delta = F.linear(rows, self.lora_B) * self.lora_scaling
        scale = getattr(self, "embed_scale", None)
        return delta if scale is None else delta * scale

    def lora_weight_delta(self) -> Tensor:
        """``s · (B A)ᵀ``: ``(num_embeddings, dim)``."""
        return self.lora_scaling * (self.lora_B @ self.lora_A).t()


class LoraEmbedding(LoraOverEmbedding, nn.Embedding):  # type: ignore[misc]  # forward takes one argument
    """``nn.Embedding`` with a low-rank update, ``y = W[x] + s · A[:, x]ᵀ Bᵀ``."""
