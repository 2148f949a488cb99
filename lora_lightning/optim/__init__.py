"""Optimizers that see adapter parameters only."""

from lora_lightning.optim.trainable_only import keep_trainable

__all__ = ["keep_trainable"]
