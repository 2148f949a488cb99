"""What injection does beside adapting layers: parameters, rows of tokens, heads tied to an adapted embedding."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_lightning.config import LoraConfig
from lora_lightning.injection.initialise import generator_for, initialise
from lora_lightning.injection.names import canonical_modules, forget_walks, unwrap
from lora_lightning.injection.state import copy_originals
from lora_lightning.injection.targets import Plan
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.parameters import adapt_parameter, parameters_of_holder
from lora_lightning.layers.tied import adapt_tied
from lora_lightning.layers.tokens import CHILD, ROWS, TokenRows, restore_tokens, train_tokens


def inject_beside(root: nn.Module, plan: Plan, config: LoraConfig, seed: int, *, fill: bool) -> None:
    """Carry out what a plan says of parameters, tokens and tied heads; what is there already stays.

    Args:
        root: The model, whose layers have been adapted.
        plan: What to do.
        config: The config.
        seed: Of first values.
        fill: Whether to give adapters of parameters first values; rows of tokens always begin as the base's.
    """
    for target in plan.parameters:
        if any(known.lora_parameter == target.parameter for known in parameters_of_holder(target.holder)):
            continue
        scaling = config.scaling(target.r, target.lora_alpha)
        layer = adapt_parameter(target.holder, target.parameter, target.r, target.lora_alpha, scaling)
        if fill:
            initialise(layer, config, generator_for(seed, target.name))
    for tokens in plan.tokens:
        if CHILD not in tokens.layer._modules:
            rows = train_tokens(tokens.layer, tokens.tokens, list(tokens.followers.values()))
            copy_originals(rows, [ROWS])
    modules = dict(canonical_modules(root)) if plan.followers else {}
    for name, source in plan.followers.items():
        adapted, head = modules[source], modules[name]
        if isinstance(adapted, LoraLayer) and not isinstance(head, LoraLayer):
            adapt_tied(head, adapted, source, config.lora_dropout)
    if plan.parameters or plan.tokens:
        forget_walks()


def token_rows(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Rows of tokens that train, by canonical name."""
    for name, module in canonical_modules(unwrap(model)):
        if isinstance(module, TokenRows):
            yield name, module


def remove_beside(model: nn.Module) -> None:
    """Leave layers whose tokens trained with the base's rows."""
    for _, rows in list(token_rows(model)):
        restore_tokens(rows)
    forget_walks()
