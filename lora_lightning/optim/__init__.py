"""Optimizers that see adapter parameters only, and step on them fast."""

from lora_lightning.optim.fused import fuse
from lora_lightning.optim.trainable_only import keep_trainable

__all__ = ["fuse", "keep_trainable"]
