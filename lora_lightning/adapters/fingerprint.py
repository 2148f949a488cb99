"""A short name for the weights of a base model, to notice an adapter over another base than its own."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_lightning.injection.names import canonical
from lora_lightning.injection.state import adapter_tensors

_SAMPLES = 16


@torch.no_grad()
def fingerprint(root: nn.Module) -> str | None:
    """A hash over names, shapes and a few values of every frozen base parameter.

    None where this process has not all of them (meta device, sharded). A few values of each tensor tell two bases apart
    and cost no pass over the weights. A quantised base and its full-precision twin have different fingerprints, so a
    difference is a reason to warn, not to refuse.
    """
    own = {id(tensor) for tensor in adapter_tensors(root).values()}
    base = sorted((canonical(name), p) for name, p in root.named_parameters() if id(p) not in own)
    if not base or any(p.is_meta or isinstance(p, DTensor) or not p.numel() for _, p in base):
        return None
    digest = hashlib.sha256()
    for name, parameter in base:
        flat = parameter.detach().reshape(-1)
        step = max(flat.numel() // _SAMPLES, 1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[::step][:_SAMPLES].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
