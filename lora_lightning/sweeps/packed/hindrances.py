"""What an adapted model must not have to be trained together with others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import canonical_modules, unwrap
from lora_lightning.injection.starts.residual import weight_before
from lora_lightning.injection.state import adapter_tensors, lora_layers, record_of, the_root, trained_in_full
from lora_lightning.injection.targets import output_embeddings
from lora_lightning.layers import LoraLayer, LoraLinear
from lora_lightning.layers.group import at_once


def why_not_packed(model: nn.Module) -> str | None:
    """Why an injected model cannot be trained together with others on one base; None where nothing is in the way."""
    model = unwrap(model)
    try:
        _, root = the_root(model)
    except AdapterError:
        return "it has no adapter"
    if record_of(root).bases:
        return "an adapter is folded into its base, which is everybody's"
    head = output_embeddings(root)
    for name, layer in lora_layers(model):
        if (why := _why_not_layer(layer, head)) is not None:
            return f"its layer {name} {why}"
    if full := [name for name, _, _ in trained_in_full(model)]:
        return f"it trains {', '.join(full[:3])} in full, and jobs share everything but low-rank adapters"
    own = {id(tensor) for tensor in adapter_tensors(model).values()}
    if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
        return f"it trains {', '.join(others[:3])} beside its adapter"
    if len({layer.lora_dropout for _, layer in lora_layers(model)}) > 1:
        return "its layers have different lora_dropout"
    return next(_why_not_base(model), None)


def _why_not_layer(layer: LoraLayer, head: nn.Module | None) -> str | None:
    if type(layer).forward is not LoraLinear.forward:
        return f"is a {type(layer).__name__}: only plain LoRA on linear layers is computed for many jobs at once"
    if weight_before(layer) is not None or layer.lora_still:
        return "has changed its base weight, or does not train all of its adapter, by its init_lora_weights"
    if layer is head:
        return "is the head, whose logits are never made as a whole"
    if layer._forward_hooks or not (at_once([layer]) or not layer.lora_enabled):
        return "has hooks on it, or its weight is not a plain tensor in memory"
    if not layer.lora_enabled:
        return "has its adapter switched off (lora_disabled)"
    return None


def _why_not_base(model: nn.Module) -> Iterator[str]:
    """What draws, joins rows or remembers in the base itself."""
    for name, module in canonical_modules(model):
        where = name or type(model).__name__
        if isinstance(module, _NormBase) and module.track_running_stats:
            yield f"{where} keeps running statistics, which all jobs would move"
        for key, p in _draws(module):
            yield f"{where} has a dropout of its own ({key}={p:g}), whose draws would be others than in a run alone"
        if getattr(module, "gradient_checkpointing", False):
            yield "it computes its blocks again in backward (gradient_checkpointing), and would draw dropout again"
        if module._compiled_call_impl is not None:
            yield f"{where} is compiled"
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        yield "its routers have a loss over all rows (output_router_logits)"


def _draws(module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, _DropoutNd):
        if module.p:
            yield "p", module.p
        return
    for key, value in vars(module).items():
        drawn = ("drop" in key or "jitter" in key) and not key.startswith("lora_")
        if drawn and isinstance(value, float) and value > 0:
            yield key, value
