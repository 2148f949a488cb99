"""Losses out of a model's own forward, without its logits.

A model's forward is run as it stands, but for the time of the call its head answers with something else: it computes
the losses of the positions that have a label, and returns a probe in place of the logits: two rows of known numbers, as
wide as the vocabulary. What comes out of the model where its logits should be then shows what it does to them, to the
last column: nothing, a scale, a soft cap. This is compared with what the losses were computed with, at every call, so
that nothing is assumed of an architecture and nothing remembered can grow old.

The head is computed inside the model's forward since only there a sharding engine shows the weights whole, and losses
and outputs are tied in the graph since engines (FSDP, DDP) find their way by the outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules import module as nn_module

from lora_lightning.injection.names import find_root, unwrap
from lora_lightning.layers import LoraLinear
from lora_lightning.layers.cross_entropy import HeadLora, is_plain, linear_cross_entropy, unseen
from lora_lightning.layers.row_losses import Form
from lora_lightning.tasks.probe import form_of, probe

# What a model did to its head's products when it was last seen; None: more than a `Form` can say.
_FORMS: WeakKeyDictionary[nn.Module, Form | None] = WeakKeyDictionary()


def root_of(model: nn.Module) -> nn.Module:
    """The transformers model inside, or the module itself where there is none."""
    inner = unwrap(model)
    if _has_head(type(inner)):
        return inner
    root = find_root(inner)[1]
    if _has_head(root):  # maybe only in the name of what it is around, as PEFT's classes
        root = next((module for module in root.modules() if _has_head(type(module))), root)
    return root


def _has_head(thing: object) -> bool:
    return callable(getattr(thing, "get_output_embeddings", None))


@partial(torch.compiler.disable, recursive=False)  # the model is compiled, not what is remembered of models
def run_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets_BT: Tensor,
    rows_K: Tensor,
    label_smoothing: float = 0.0,
) -> tuple[Any, Tensor | None] | None:
    """Run a model so that its head gives losses instead of logits.

    Args:
        model: A causal language model, wrapped or not.
        inputs: What its forward is called with.
        targets_BT: What each position is to predict, (B, T).
        rows_K: Which of the B · T positions are scored.
        label_smoothing: As for `linear_cross_entropy`.

    Returns:
        What the model returned, and the losses (K,) of the positions; None in their place where the model's logits are
        real after all. None altogether where they have to be: somebody reads them, or the model does more to them than
        a scale and a soft cap.
    """
    root = root_of(model)
    head = head_of(root)
    if head is None or not _may_answer(model, root, head):
        return None
    restore = None if root in _FORMS else _draws_of(head)
    for _ in range(2):  # twice where the first run has shown another form than was taken for granted
        form = _FORMS.get(root, Form())
        if form is None:
            return None
        call = _HeadCall(head, targets_BT, rows_K, form, label_smoothing)
        outputs = call.run(model, inputs)
        if call.losses_K is None and call.failure is None:  # passed by, or not in a state to answer
            return outputs, None
        seen = _form_seen(call, outputs)
        if seen == form:
            _FORMS[root] = form
            return outputs, _Tie.apply(call.losses_K, logits_of(outputs))
        if seen is None:
            why = call.failure or "it does more to them than to scale and cap them"
            warnings.warn(f"{type(root).__name__} makes its logits in full, which takes memory: {why}", stacklevel=4)
        _FORMS[root] = seen
        if restore is not None:
            restore()  # what dropout drew is drawn again, so that a run does not depend on what was seen before it
    return None


def logits_of(outputs: Any) -> Any:
    """Where a model's logits are in what it returns: an attribute, the first of a tuple, or the whole."""
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs if isinstance(outputs, Tensor) else outputs.logits


class _HeadCall:
    """What a head does during one forward of its model."""

    def __init__(self, head: nn.Linear, targets_BT: Tensor, rows_K: Tensor, form: Form, label_smoothing: float) -> None:
        self.head, self.targets_BT, self.rows_K = head, targets_BT, rows_K
        self.form, self.label_smoothing = form, label_smoothing
        self.times = 0
        self.losses_K: Tensor | None = None
        self.sent: Tensor | None = None  # the probe, as the model will not change it
        self.node: Any = None  # where it enters the graph
        self.failure: Exception | None = None

    @partial(torch.compiler.disable, recursive=False)
    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        _CALLS[self.head] = self
        self.head.forward = MethodType(_answer, self.head)  # type: ignore[method-assign]
        try:
            return model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Without having come as far as the probe, it is the batch that is wrong, or else the graph of a compiled
            # model that must not be left (``fullgraph=True``).
            if self.losses_K is None and not isinstance(error, TorchDynamoException):
                raise
            self.failure = error
            return None
        finally:
            del self.head.forward  # the class's own again
            del _CALLS[self.head]

    def answer(self, x_BTD: Tensor) -> Tensor:
        """The probe, (1, 2, V), for what the head gets; real logits where that is not a row a position."""
        self.times += 1
        lora = lora_of(self.head)
        plain = is_plain(x_BTD, self.head.weight, self.head.bias, *(lora[:2] if lora else ()))
        if self.times > 1 or not plain or x_BTD.shape[:-1] != self.targets_BT.shape:
            return type(self.head).forward(self.head, x_BTD)
        rows_K = self.rows_K.to(x_BTD.device)
        self.losses_K = linear_cross_entropy(
            x_BTD.flatten(0, 1).index_select(0, rows_K),
            self.head.weight,
            self.head.bias,
            self.targets_BT.flatten().to(x_BTD.device)[rows_K],
            form=self.form,
            label_smoothing=self.label_smoothing,
            lora=lora,
        )
        self.sent = probe(len(self.head.weight), x_BTD.device)
        answer = _Tie.apply(self.sent, self.losses_K)
        self.node = answer.grad_fn
        return answer


# The call that a head answers for now. What stands in for its forward is one function at all calls, or a compiled model
# would be compiled anew at each.
_CALLS: WeakKeyDictionary[nn.Module, _HeadCall] = WeakKeyDictionary()


@torch.compiler.disable
def _answer(head: nn.Linear, x_BTD: Tensor) -> Tensor:
    return _CALLS[head].answer(x_BTD)


class _Tie(torch.autograd.Function):
    """The values of one tensor, depending on another as well, with a gradient of zero."""

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        other = inputs[1]
        ctx.other = {"size": other.shape, "dtype": other.dtype, "device": other.device}

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros(**ctx.other)


def head_of(root: nn.Module) -> nn.Linear | None:
    """The output layer, if it is a linear layer whose forward is known."""
    try:
        head = cast("Any", root).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    known = type(head) in (nn.Linear, LoraLinear) and head._parameters.keys() <= {"weight", "bias", "lora_A", "lora_B"}
    return head if known else None


def lora_of(head: nn.Linear) -> HeadLora | None:
    """The adapter on an output layer, where there is one in force."""
    if not isinstance(head, LoraLinear) or not head.lora_enabled:
        return None
    return HeadLora(head.lora_A, head.lora_B, head.lora_scaling, head._active_dropout)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.compiler.disable
def needs_all_logits(model: nn.Module) -> bool:
    """Whether somebody reads a model's logits, or it does things to them that may join positions."""
    root = root_of(model)
    read = [root, *_around(model, root), *filter(None, [head_of(root)])]
    return _FORMS.get(root, Form()) is None or any(_is_read(module) for module in read)


def _may_answer(model: nn.Module, root: nn.Module, head: nn.Linear) -> bool:
    """Whether nobody would notice: no hook sees what the head gets and gives, or what the model gives."""
    if unseen() or "forward" in vars(head) or head._compiled_call_impl is not None:
        return False
    if any(getattr(head, name) or getattr(nn_module, f"_global{name}") for name in _HOOKS):
        return False
    return not any(
        isinstance(module, nn.DataParallel)  # its replicas would all answer with the first one's weights
        or type(module).__name__ == "CheckpointWrapper"  # the head would run again in backward, for itself
        or _is_read(module)
        for module in _around(model, root)
    )


def _around(model: nn.Module, root: nn.Module) -> Iterator[nn.Module]:
    """What a call passes on its way to the root, and the root."""
    for module in model.modules():
        yield module
        if module is root:
            return


def _is_read(module: nn.Module) -> bool:
    """Whether a forward hook of somebody, rather than of a sharding engine or of ours, sees a module's outputs."""
    hooks = module._forward_hooks.values()
    return any(not str(getattr(hook, "__module__", "")).startswith(("torch.", "lora_lightning.")) for hook in hooks)


def _draws_of(head: nn.Linear) -> Callable[[], None]:
    """Gives back the states that torch's generators have now."""
    device, states = head.weight.device, torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(states)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    return restore


def _form_seen(call: _HeadCall, outputs: Any) -> Form | None:
    """What the model has done to the probe, if that is all that the head was asked, and nothing in it trains."""
    if call.failure is not None or call.times > 1 or call.sent is None:
        return None
    came = logits_of(outputs)
    form = form_of(call.sent, came, call.form)
    return None if form is None or _trains(came.grad_fn, call.node) else form


def _trains(node: Any, until: Any) -> bool:
    """Whether a parameter has a part in a result, besides what ``until`` leads to."""
    ahead, met = [node], {None, until}
    while ahead:
        if (node := ahead.pop()) not in met:
            if hasattr(node, "variable"):
                return True
            met.add(node)
            ahead += [before for before, _ in node.next_functions]
    return False
