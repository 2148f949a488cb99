"""A short name for the weights of a base model, to notice an adapter over another base than its own."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_lightning.injection.names import canonical
from lora_lightning.injection.starts.residual import weight_before
from lora_lightning.injection.state import adapter_tensors, lora_layers
from lora_lightning.layers.bits import values_of

_SAMPLES = 16


@torch.no_grad()
def fingerprint(root: nn.Module, rounded_to: torch.dtype | None = None) -> str | None:
    """A hash over names, shapes and a few values of every frozen base parameter, as it was before any adapter.

    None where this process has not all of them (meta device, sharded). A few values of each tensor tell two bases apart
    and cost no pass over the weights. A quantised base and its full-precision twin have different fingerprints, so a
    difference is a reason to warn, not to refuse. That of the same weights in half precision is told by ``rounded_to``.
    """
    own = {id(tensor) for tensor in adapter_tensors(root).values()}
    base = sorted((canonical(name), p) for name, p in root.named_parameters() if id(p) not in own)
    if not base or any(p.is_meta or isinstance(p, DTensor) or not p.numel() for _, p in base):
        return None
    changed = ((layer, weight_before(layer)) for _, layer in lora_layers(root))
    untouched = {id(layer.weight): weight for layer, weight in changed if weight is not None}
    digest = hashlib.sha256()
    for name, parameter in base:
        values = values_of(untouched.get(id(parameter), parameter))
        flat = values.reshape(-1)
        step = max(flat.numel() // _SAMPLES, 1)
        digest.update(f"{name}{tuple(values.shape)}".encode())
        sample = flat[::step][:_SAMPLES]
        sample = sample if rounded_to is None else sample.to(rounded_to)
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
