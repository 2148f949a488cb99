"""Where an activated adapter is in force: found in a call's token numbers, and remembered with its cache.

Shapes: B rows, T tokens that a call is given, n invocation tokens.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor, Replicate

from lora_lightning.errors import LoraConfigError


class Rows(NamedTuple):
    """What a text that goes on has come to: all of it that is known; in a compiled graph what it needs of its end."""

    active_BL: Tensor
    """Whether the invocation tokens had appeared by then, whole."""
    ids_BL: Tensor
    """Token numbers, -1 where there were none: with what follows the last of them may be the invocation."""
    length: int | None = None
    """How many tokens the cache held with them; None where nobody counts."""

    def left(self, length: int) -> Rows | None:
        """The same where the cache holds so many by now: tokens may have been taken back (``crop``)."""
        gone = 0 if self.length is None else max(0, self.length - length)
        kept = self.ids_BL.shape[1] - gone
        return Rows(self.active_BL[:, :kept], self.ids_BL[:, :kept]) if kept > 0 else None


class Call:
    """One forward of a model.

    Attributes:
        mask_BT: Where the adapter is in force.
        kept: Which positions the head is computed at, as the model was told (``logits_to_keep``).
        rows: What the text comes to with this call.
    """

    def __init__(self, mask_BT: Tensor, kept: Any, rows: Rows | None) -> None:
        self.mask_BT, self.kept, self.rows = mask_BT, kept, rows


class Invocation:
    """Notes, at each call of a model, where its adapter is in force: two hooks, and what layers ask.

    A row in which the tokens do not appear is the base's, whoever has written them: a text that comes in parts, or is
    generated one by one, is what it is as a whole. A model that is called with a cache that it has never seen continues
    the base's. The beams of a row are taken to be in force alike.

    Args:
        tokens: The invocation tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._owner: nn.Module | None = None  # whose call is under way; modules inside it are asked too
        self._call: Call | None = None
        # Those whose backward may come: activation checkpointing runs layers again in it.
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._warned = False

    def __getstate__(self) -> tuple[int, ...]:
        return self.tokens  # nothing of a call belongs into a copy

    def __setstate__(self, tokens: tuple[int, ...]) -> None:
        Invocation.__init__(self, tokens)

    # ---- hooks

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Find the tokens in what a model is called with; its argument ``alora_offsets``, PEFT's, is taken out."""
        if self._owner is not None and self._owner is not module:
            return None
        offsets = kwargs.pop("alora_offsets", None)
        cache = kwargs.get("past_key_values")
        length = _length(cache)
        past: Rows | None = vars(cache).get(_ROWS, {}).get(self.tokens) if length else None
        past = None if past is None else past.left(length)
        ids_BT = _token_numbers(args, kwargs)
        if ids_BT is None and offsets is None:
            self._warn()
            call = Call(torch.zeros(1, 1, dtype=torch.bool), None, past)
        elif ids_BT is None or offsets is not None:
            call = _by_offsets(offsets, ids_BT, kwargs, past)
        else:
            call = self._found(ids_BT, kwargs.get("position_ids"), past)
        call.kept = kwargs.get("logits_to_keep")
        self._owner, self._call = module, call
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the call, and keep with its cache and its graph what they need of it."""
        call = self._call
        if module is not self._owner or call is None:
            return
        self._owner = self._call = None
        cache = getattr(output, "past_key_values", None)
        if call.rows is not None and _length(cache):
            # With the cache, so that its copies know too.
            vars(cache).setdefault(_ROWS, {})[self.tokens] = self._remembered(call.rows, cache)
        if (node := _graph_of(output)) is not None:
            node.metadata[_CALL] = call
            node.register_hook(lambda *_: self._in_backward(call))
            self._calls.add(call)

    def _in_backward(self, call: Call) -> None:
        """A call waits (again, where its graph is retained) until the backward that has reached it is done."""
        self._calls.add(call)
        Variable._execution_engine.queue_callback(lambda: self._calls.discard(call))

    def _remembered(self, rows: Rows, cache: Any) -> Rows:
        """What is kept of a text; a graph would be compiled anew for each length of it."""
        if not torch.compiler.is_compiling():
            return rows._replace(length=_length(cache))
        needed = max(1, len(self.tokens) - 1)
        return Rows(rows.active_BL[:, -needed:], rows.ids_BL[:, -needed:])

    def _found(self, ids_BT: Tensor, position_ids: Any, past: Rows | None) -> Call:
        batch, length = ids_BT.shape
        text, texts = ids_BT, _texts(ids_BT, position_ids)
        if past is not None:
            past = _for_rows(past, batch, ids_BT.device)
            last_BN = past.ids_BL[:, max(0, past.ids_BL.shape[1] - (len(self.tokens) - 1)) :]
            text = torch.cat([last_BN, ids_BT], dim=1)
            texts = torch.nn.functional.pad(texts, (last_BN.shape[1], 0))
        places = torch.arange(text.shape[1], device=text.device)
        last = _last_start(text, self.tokens, texts)
        mask_BT = (last >= 0) & (places >= last)
        active_BT = _first_end(text, self.tokens, texts) <= places
        if past is not None:
            before = (texts == 0) & past.active_BL[:, -1:]
            mask_BT, active_BT = mask_BT | (before & (last < 0)), active_BT | before
        mask_BT = mask_BT[:, -length:]
        return Call(mask_BT, None, _followed_by(past, active_BT[:, -length:], ids_BT))

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "called without token numbers (input_ids), in which the adapter's invocation tokens could be found: "
                "the outputs are the base model's. Give input_ids, or alora_offsets (the place of the first invocation "
                "token of each row, counted from the end, None where there is none)",
                stacklevel=4,
            )

    # ---- what layers ask

    def mask_of(self, out: Tensor) -> Tensor:
        """Where the adapter is in force in a layer's output, ``(B, T, out)`` or ``(B, out)``: of its shape but for 1s.

        Raises:
            LoraConfigError: If the layer's rows and positions are not those of the model's call.
        """
        call = self._call if self._call is not None else self._computed_again()
        mask = _fitted(call, out.shape)
        if mask is None:
            batch, length = call.mask_BT.shape
            raise LoraConfigError(
                f"an activated adapter (alora_invocation_tokens) is on a layer that gives {tuple(out.shape)} where the "
                f"model was called with {batch} rows of {length} tokens, so that nobody knows which of its rows come "
                "after the invocation (a mixture's experts are so): leave it out, with its name in exclude_modules"
            )
        mask = mask.to(out.device)
        if isinstance(out, DTensor):  # the same on every process, as the call's token numbers are
            everywhere = [Replicate()] * out.device_mesh.ndim
            return DTensor.from_local(mask, out.device_mesh, everywhere, run_check=False)
        return mask

    def _computed_again(self) -> Call:
        calls = list(self._calls)
        if torch._C._current_graph_task_id() == -1 or not calls:
            raise LoraConfigError(
                "a layer with an activated adapter (alora_invocation_tokens) was called by itself: call the model, "
                "whose input_ids say where the adapter is in force, or use lora_disabled(model)"
            )
        if any(not _same(call.mask_BT, calls[0].mask_BT) for call in calls[1:]):
            raise LoraConfigError(
                "activation checkpointing computes a layer again, and several forwards wait for their backward: of an "
                "activated adapter nobody knows which one this is. Call backward after each forward, or turn "
                "checkpointing off"
            )
        return calls[0]


_CALL = "lora_invocation"
_ROWS = "_lora_invoked"
"""Name of what a cache has come to: a dictionary of :class:`Rows`, by the tokens that were looked for."""


def _last_start(ids_BT: Tensor, tokens: Sequence[int], texts_BT: Tensor) -> Tensor:
    """Where the last appearance of the tokens in a position's own text begins, (B, T); -1 where there is none."""
    last_BT = torch.full_like(texts_BT, -1)
    if ids_BT.shape[1] < len(tokens):
        return last_BT
    hits, ends = _appearances(ids_BT, tokens, texts_BT)
    starts = torch.where(hits, torch.arange(hits.shape[1], device=ids_BT.device), -1)
    return last_BT.scatter_reduce(1, ends, starts, "amax").gather(1, texts_BT)


def _first_end(ids_BT: Tensor, tokens: Sequence[int], texts_BT: Tensor) -> Tensor:
    """Where the first appearance of the tokens in a position's own text ends, (B, T); T where there is none."""
    length, n = ids_BT.shape[1], len(tokens)
    first_BT = torch.full_like(texts_BT, length)
    if length < n:
        return first_BT
    hits, ends = _appearances(ids_BT, tokens, texts_BT)
    last = torch.where(hits, torch.arange(n - 1, length, device=ids_BT.device), length)
    return first_BT.scatter_reduce(1, ends, last, "amin").gather(1, texts_BT)


def _appearances(ids_BT: Tensor, tokens: Sequence[int], texts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the n tokens begin at a position, (B, T - n + 1), and the texts in which they would end."""
    n = len(tokens)
    ends = texts_BT[:, n - 1 :]
    wanted = torch.tensor(tokens, device=ids_BT.device)
    return (ids_BT.unfold(1, n, 1) == wanted).all(-1) & (texts_BT[:, : ends.shape[1]] == ends), ends


def _texts(ids_BT: Tensor, position_ids: Any) -> Tensor:
    """Which text of its row each token belongs to, (B, T): where positions begin anew, another one does."""
    texts = torch.zeros_like(ids_BT, dtype=torch.long)
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == ids_BT.shape[1]:
        texts[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]).cumsum(1).to(ids_BT.device)
    return texts


def _by_offsets(
    offsets: Sequence[int | None], ids_BT: Tensor | None, kwargs: dict[str, Any], past: Rows | None
) -> Call:
    given = ids_BT if ids_BT is not None else kwargs["inputs_embeds"]
    length = given.shape[1]
    counted = torch.tensor([0 if each is None else min(int(each), length) for each in offsets], device=given.device)
    mask_BT = torch.arange(length, device=given.device) >= length - counted[:, None]
    past = None if past is None else _for_rows(past, len(mask_BT), mask_BT.device)
    unknown = torch.full_like(mask_BT, -1, dtype=torch.long)
    return Call(mask_BT, None, _followed_by(past, mask_BT, unknown if ids_BT is None else ids_BT))


def _token_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.ndim not in (1, 2):
        return None
    return given if given.ndim == 2 else given[None]


def _length(cache: Any) -> int:
    """How many tokens a cache of transformers holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _for_rows(past: Rows, batch: int, device: torch.device) -> Rows:
    """What is known of the rows, where each has become several (beams)."""
    times, left = divmod(batch, len(past.ids_BL))
    if left or not times:
        raise LoraConfigError(f"a cache of {len(past.ids_BL)} rows goes on with {batch} rows")
    known = past.active_BL.to(device), past.ids_BL.to(device)
    return Rows(*(known if times == 1 else (each.repeat_interleave(times, 0) for each in known)))


def _followed_by(past: Rows | None, active_BT: Tensor, ids_BT: Tensor) -> Rows:
    """What a text comes to with a call's tokens."""
    if past is None:
        return Rows(active_BT, ids_BT)
    return Rows(torch.cat([past.active_BL, active_BT], dim=1), torch.cat([past.ids_BL, ids_BT], dim=1))


def _fitted(call: Call, shape: Sequence[int]) -> Tensor | None:
    """A call's mask for a layer's output of a shape, or None."""
    mask_BT = call.mask_BT
    batch, length = mask_BT.shape
    if mask_BT.numel() == 1 and call.rows is None:
        return mask_BT.view((1,) * len(shape))
    if len(shape) == 2:
        return mask_BT.reshape(-1, 1) if shape[0] == batch * length else mask_BT[:, -1:] if shape[0] == batch else None
    if len(shape) == 3 and shape[0] == batch and shape[1] != length:  # a head, at some positions
        kept = call.kept
        if isinstance(kept, Tensor) and kept.ndim == 1 and len(kept) == shape[1]:
            mask_BT = mask_BT[:, kept.to(mask_BT.device)]
        elif shape[1] in (1, kept):
            mask_BT = mask_BT[:, -shape[1] :]
    return mask_BT[:, :, None] if tuple(shape[:-1]) == tuple(mask_BT.shape) else None


def _graph_of(output: Any) -> Any:
    """A node of the graph that leads to a model's output, or None."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return next((value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
