"""Optimizers of adapters: such as know ``A`` from ``B``, and what lets any see adapters only and step on them fast."""

from lora_lightning.optim.fused import fuse
from lora_lightning.optim.groups import parameter_groups
from lora_lightning.optim.lora_fa import lora_fa
from lora_lightning.optim.lora_plus import lora_plus
from lora_lightning.optim.lora_rite import lora_rite
from lora_lightning.optim.packages import adamw_8bit, schedule_free
from lora_lightning.optim.riemannian import precondition, riemannian, riemannian_sgd
from lora_lightning.optim.trainable_only import keep_trainable

__all__ = [
    "adamw_8bit",
    "fuse",
    "keep_trainable",
    "lora_fa",
    "lora_plus",
    "lora_rite",
    "parameter_groups",
    "precondition",
    "riemannian",
    "riemannian_sgd",
    "schedule_free",
]
