"""Attention over packed rows: every token sees its own example only, at the cost of the examples and not of the row.

transformers asks for a mask once a forward and hands it to every layer. For packed rows, what `packed_mask` hands out
is no mask but the edges of the examples, a short tensor; being an argument of the layers, it is the same one when a
checkpointed layer is run again in the backward pass. `packed_attention` then attends to each example by itself: n
examples of T tokens cost n·T², one row of them with a mask (n·T)². Everything else (padded batches, key-value caches,
sliding windows, chunks, compiled models) is left to transformers' own ``sdpa``, mask and all.

Shapes: B rows, T tokens a row, H heads, D features a head, N examples in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention.sdpa_attention_forward

NAME = "packed_sdpa"
"""What these two functions are called in a model's ``attn_implementation``."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What a layer may ask for and ``sdpa``, which would pass over it, does not know: capped scores, sinks, biases."""


def packed_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """The edges of a batch's examples where whole causal attention is asked for, else the mask that ``sdpa`` takes.

    Args:
        batch_size: B.
        kv_length: T, where nothing is cached.
        mask_function: Of (row, head, token, other token): whether the token sees the other.
        attention_mask: (B, T), for padded batches; packed ones have none.
        local_size: Of a sliding window or a chunk, which the edges alone do not tell.
        allow_is_causal_skip: False where rows are packed.
        use_vmap: True where a model changes the mask by a function of its own.
        **others: Further arguments of transformers' mask functions, which differ from version to version.

    Returns:
        (N + 1,) int32: where examples begin in the flattened batch, and its end. Or (B, 1, T, T), or None.
    """
    asked = others["q_length"] if "q_length" in others else len(others["cache_position"])
    packed = not (allow_is_causal_skip or use_vmap) and attention_mask is None and local_size is None
    if not packed or asked != kv_length or torch.compiler.is_compiling():
        usual = {"attention_mask": attention_mask, "local_size": local_size, "use_vmap": use_vmap}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=batch_size,
            kv_length=kv_length,
            mask_function=mask_function,
            allow_is_causal_skip=allow_is_causal_skip,
            **usual,
            **others,
        )
    device = others.get("device") or others["cache_position"].device
    row, token = torch.arange(batch_size, device=device)[:, None], torch.arange(1, kv_length, device=device)[None]
    begins_BT = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    begins_BT[:, 1:] = ~mask_function(row, torch.zeros_like(row), token, token - 1)  # sees nothing of the one before
    begins = begins_BT.flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([begins_BT.numel()])]).int()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every example of packed rows to itself.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: The same, perhaps of fewer heads.
        value: The same as ``key``.
        attention_mask: What `packed_mask` gave.
        dropout: Of the attention weights.
        scaling: Of the scores.
        **others: Passed on.

    Returns:
        (B, T, H, D), and no weights.

    Raises:
        NotImplementedError: If the layer needs what ``sdpa`` does not know.
    """
    if unknown := [name for name in UNKNOWN if others.get(name) is not None]:
        raise NotImplementedError(f"{NAME} does not know {', '.join(unknown)}")
    others |= {"dropout": dropout, "scaling": scaling}
    if attention_mask is None or attention_mask.ndim != 1:
        return _sdpa(module, query, key, value, attention_mask, **others)
    if dropout == 0 and _fits_kernel(query, value):
        return _kernel(query, key, value, attention_mask, scaling), None
    rows, _, width, _ = query.shape
    lengths: list[list[int]] = [[] for _ in range(rows)]
    for begin, end in pairwise(attention_mask.tolist()):
        lengths[begin // width].append(end - begin)

    def examples(states: Tensor) -> list[Tensor]:
        # split and unbind, for one gradient of the whole; a slice's would be as large as the row for each example.
        split = (row.split(parts, dim=1) for row, parts in zip(states.unbind(), lengths, strict=True))
        return [part[None] for parts in split for part in parts]

    parts = zip(*map(examples, (query, key, value)), strict=True)
    attended = [_sdpa(module, *part, None, **others)[0] for part in parts]
    return torch.cat(attended, dim=1).unflatten(1, (rows, width))[0], None


@cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """Attention of torch's own over rows of unequal length (torch >= 2.10), and the names of its arguments."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    attend: Callable[..., Any] = varlen_attn
    return attend, frozenset(inspect.signature(varlen_attn).parameters)


def _fits_kernel(query: Tensor, value: Tensor) -> bool:
    features = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and features == value.shape[-1]
        and features <= 256
        and features % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _varlen() is not None
    )


def _kernel(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, scaling: float | None) -> Tensor:
    attend, known = _varlen()  # type: ignore[misc]  # asked for before
    rows, heads, width, features = query.shape
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        causal["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * features**0.5)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    # The row's width, not the longest example's: that would have to be waited for.
    return attend(*flat, edges, edges, width, width, **causal).unflatten(0, (rows, width))


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
