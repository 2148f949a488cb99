"""What DDP need not send around: a frozen base that every process has loaded by itself."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical_modules
from lora_lightning.injection.state import injected_roots
from lora_lightning.layers.bits import is_quantised, values_of
from lora_lightning.strategies.equal import differing

_DDP = "_ddp_params_and_buffers_to_ignore"  # torch's name: DDP reads it off the module that it wraps
_OURS = "_lora_not_broadcast"


def skip_frozen(pl_module: pl.LightningModule) -> list[str]:
    """Have DDP leave out the frozen base, which it would send from rank 0 to all others, and its buffers at each step.

    Call it on every process, after injection and before the strategy wraps the module. Only what has the same bits
    everywhere is left out: a base that was initialised at random without a seed is sent, as ever. Running statistics
    of normalisation layers go on being synchronised, since they move although their layers are frozen; so does
    everything outside the injected model except its frozen parameters. Names that the user has set stay.

    Returns:
        What is left out, by the names that DDP knows, those that the user has set not counted.

    Raises:
        AdapterError: If processes have different models, or quantised weights of different values.
    """
    include_frozen(pl_module)
    if not torch.distributed.is_initialized():
        return []
    few = {name: values_of(parameter) for name, parameter in _in_few_bits(pl_module)}
    candidates = {**dict(_frozen(pl_module)), **few}
    found = differing(candidates)
    if torn := [name for name in few if name in found]:
        raise AdapterError(
            f"processes have different values in quantised weights, first {torn[0]}, and DDP could send these without "
            "the scales that they are read by: let every process load the same base, made from the same seed"
        )
    same = [name for name in candidates if name not in found]
    users = list(getattr(pl_module, _DDP, ()))
    vars(pl_module)[_OURS] = ours = [name for name in same if name not in users]
    vars(pl_module)[_DDP] = users + ours
    return ours


def include_frozen(pl_module: pl.LightningModule) -> None:
    """Undo :func:`skip_frozen`."""
    if _OURS not in vars(pl_module):
        return
    ours = set(vars(pl_module).pop(_OURS))
    vars(pl_module)[_DDP] = [name for name in getattr(pl_module, _DDP) if name not in ours]
    if not vars(pl_module)[_DDP]:
        del vars(pl_module)[_DDP]


def _frozen(pl_module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that no step changes, by name; torch's own tensor types only, whose bits can be read."""
    inside = {id(part) for root in injected_roots(pl_module).values() for part in root.modules()}
    moving = {
        id(buffer)
        for _, module in canonical_modules(pl_module)
        if id(module) not in inside or isinstance(module, _NormBase)
        for buffer in module.buffers(recurse=False)
    }
    few = {id(parameter) for _, parameter in _in_few_bits(pl_module)}
    for name, parameter in pl_module.named_parameters():
        if not parameter.requires_grad and type(parameter) is nn.Parameter and id(parameter) not in few:
            yield name, parameter
    for name, buffer in pl_module.named_buffers():
        if id(buffer) not in moving and type(buffer) is Tensor:
            yield name, buffer


def _in_few_bits(pl_module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Quantised weights, by the names that DDP knows."""
    weights = {id(module.weight) for module in pl_module.modules() if is_quantised(module)}
    yield from ((name, parameter) for name, parameter in pl_module.named_parameters() if id(parameter) in weights)
