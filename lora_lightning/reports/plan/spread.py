"""What one device keeps of a model and its adapter, under each strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from lora_lightning.config_starts import changes_base
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import adapter_tensors, lora_layers
from lora_lightning.layers import LoraLayer, is_linear
from lora_lightning.reports.plan.setting import Setting
from lora_lightning.strategies.blocks import blocks
from lora_lightning.strategies.parallelize import tensor_parallel_plan
from lora_lightning.tasks.head import root_of

_BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0}
_SCALES = {True: 8 / 64 + 32 / (64 * 256), False: 32 / 64}
"""Bits a weight for the scales of blocks of 64 in 4 bits: of a byte each with double quantisation, else of four."""
SHARDS_BASE = ("fsdp", "fsdp2", "tp", "deepspeed_3")


@dataclass(frozen=True)
class Held:
    """Bytes of one device that are there throughout.

    Attributes:
        weights: Of the frozen base; on a CPU also what a start that changes it keeps of it.
        adapter: Of the adapter, and what else trains.
        gradients: Of what trains.
        optimizer: What the optimizer keeps for it.
        gathered: Parts of a sharded base that are whole for a while, the most at once.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    gathered: float


def held(model: nn.Module, setting: Setting) -> Held:
    """What a device holds.

    Args:
        model: The whole model with its adapter, of fake tensors, in the dtypes of training.
        setting: The strategy, and how many devices.
    """
    split = _split(model, setting.tensor_parallel)
    quantised = _quantised(model) if setting.model.quantisation else {}

    def size(parameter: Any) -> float:
        """Bytes of a tensor on one device of a tensor-parallel mesh."""
        parts = setting.tensor_parallel if id(parameter) in split else 1
        bits = quantised_bits(setting) if id(parameter) in quantised else 8 * parameter.element_size()
        return parameter.numel() * bits / 8 / parts

    own = {id(tensor) for tensor in adapter_tensors(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(map(size, trained))
    numbers = sum(p.numel() / (setting.tensor_parallel if id(p) in split else 1) for p in trained)
    still = sum(size(p) for p in model.parameters() if not p.requires_grad and id(p) in own)
    base = sum(size(p) for p in model.parameters() if not p.requires_grad) - still
    shards = setting.groups if setting.strategy in SHARDS_BASE else 1
    states = setting.groups if setting.strategy.startswith("deepspeed") else 1
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return Held(
        weights=base / shards + buffers + (kept_before(model, setting) if setting.device == "cpu" else 0),
        adapter=gradients + still,
        gradients=gradients / (states if setting.strategy != "deepspeed_1" else 1),
        optimizer=numbers * setting.optimizer_bytes / states,
        gathered=_gathered(model, setting, own, size) if shards > 1 else 0.0,
    )


def quantised_bits(setting: Setting) -> float:
    """Bits that one weight of a quantised layer takes, its scales among them."""
    how = setting.model.quantisation or "int8"
    return _BITS[how] + (_SCALES[setting.model.double_quantisation] if how != "int8" else 0)


def dequantised(model: nn.Module, setting: Setting, dtype: torch.dtype) -> float:
    """Bytes of the largest quantised weight as numbers, which it is for a moment where a product is made with it."""
    if setting.model.quantisation is None:
        return 0.0
    return max((float(numel * dtype.itemsize) for numel in _quantised(model).values()), default=0.0)


def kept_before(model: nn.Module, setting: Setting) -> int:
    """Bytes of main memory for the weights that a start changes, as they were: whole, on every process."""
    if not changes_base(setting.lora.init_lora_weights):
        return 0
    changed = (layer.weight for _, layer in lora_layers(model) if is_linear(layer))
    return sum(weight.numel() * weight.element_size() for weight in changed)


def _quantised(model: nn.Module) -> dict[int, int]:
    """Identity and size of the weights that are read into few bits: of linear layers, but for the output layer."""
    root: Any = root_of(model)
    kept = {id(root.get_output_embeddings()) if hasattr(root, "get_output_embeddings") else 0}
    kept |= {id(part) for name in ("classifier", "score") if (part := getattr(root, name, None)) is not None}
    found = (m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in kept)
    return {id(layer.weight): layer.weight.numel() for layer in found}


def _gathered(model: nn.Module, setting: Setting, own: set[int], size: Any) -> float:
    """The two largest blocks, one in use and the next on its way, and what belongs to no block."""
    found = blocks(model)
    inside = {id(p) for block in found for p in block.parameters()}
    base = {id(p) for p in model.parameters() if not p.requires_grad and id(p) not in own}
    rest = sum(size(p) for p in model.parameters() if id(p) in base - inside)
    largest = max((sum(size(p) for p in block.parameters() if id(p) in base) for block in found), default=0.0)
    narrow = 2.0 if setting.precision.endswith("-mixed") and _is_wide(model) else 1.0
    return (rest + 2 * largest) / narrow


def _is_wide(model: nn.Module) -> bool:
    return next(p.dtype for p in model.parameters() if not p.requires_grad) == torch.float32


def _split(model: nn.Module, parts: int) -> set[int]:
    """Identities of the tensors that are split over a tensor-parallel mesh: bases, and the adapters' sides along them.

    Raises:
        LoraConfigError: There is no plan for this model.
    """
    if parts == 1:
        return set()
    modules, split = dict(canonical_modules(model)), set()
    for name, style in tensor_parallel_plan(model).items():
        layer = modules[name]
        split |= {id(p) for local, p in layer._parameters.items() if p is not None and local in ("weight", "bias")}
        if isinstance(layer, LoraLayer):
            split.add(id(layer.lora_A if _by_inputs(layer, style) else layer.lora_B))
    return split


def _by_inputs(layer: nn.Module, style: ParallelStyle) -> bool:
    return isinstance(style, RowwiseParallel) != isinstance(layer, nn.Embedding)
