"""What operations cost: bytes that are alive, floating-point operations of products, bytes that all others write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lora_lightning.tasks.live_bytes import LiveBytes

_aten = torch.ops.aten
_ASKS = (_aten._local_scalar_dense.default, _aten.is_nonzero.default)
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Metre(LiveBytes):
    """Measures operations on fake tensors while they run.

    Code may ask a tensor of truth values for its answer ("is any token padding?"). A fake one has none, so that here
    is said what it would be.

    Args:
        answer: That answer.

    Attributes:
        flops: Of matrix products, convolutions and attention.
        moved: Bytes that all other operations write.
    """

    def __init__(self, *, answer: bool) -> None:
        super().__init__()
        self._answer = answer
        self.flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKS and args[0].dtype == torch.bool:
            return self._answer
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (flops := _flops(func, args, kwargs or {}, out)) is not None:
            self.flops += flops
        elif not func.is_view:
            self.moved += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(out) if _is_tensor(leaf))
        return out


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int | None:
    packet = func._overloadpacket
    name = packet.__name__
    if name.startswith(_FLASH):  # (B, H, T, d): two products forward; five backward, one of them done again
        query, key = args[1:3] if name.endswith("backward") else args[:2]
        products = 5 if name.endswith("backward") else 2
        return products * 2 * query.numel() * key.shape[-2]
    if name in ("addmm_", "baddbmm_"):
        packet = getattr(_aten, name.rstrip("_"))
    formula = flop_registry.get(packet)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
