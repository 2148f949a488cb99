"""An adapter whose one ``lora_alpha / r`` is right for every layer, for servers that know no other (vLLM).

Those read ``r`` and ``lora_alpha`` and pass over ``rank_pattern`` and ``alpha_pattern``, so that layers with a scale of
their own would silently be scaled wrongly. Here every ``B`` takes its layer's scale up, and smaller ranks are filled up
with zeros, which changes no output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_lightning.adapters.peft_names import PREFIX
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError
from lora_lightning.injection.matching import pattern_value

if TYPE_CHECKING:
    from lora_lightning.adapters.facts import AdapterFacts

_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")


def with_one_scale(facts: AdapterFacts, state: Mapping[str, Tensor]) -> tuple[AdapterFacts, dict[str, Tensor]]:
    """The same adapter with scale 1 everywhere: ``r`` and ``lora_alpha`` are the largest rank, patterns are gone.

    Args:
        facts: An adapter's facts.
        state: Its values by name.

    Returns:
        Facts and values that give the same outputs.

    Raises:
        AdapterError: If the adapter has something that such a server refuses.
    """
    _refuse_other(facts, state)
    config = LoraConfig.from_dict({key: facts.config[key] for key in ("r", "lora_alpha", "use_rslora")})
    ranks, alphas = facts.config.get("rank_pattern") or {}, facts.config.get("alpha_pattern") or {}
    widest = max(state[name].shape[0] for name, key in facts.keys.items() if key.endswith(_A))
    folded = dict(state)
    for name, key in facts.keys.items():
        if key.endswith(_A):
            folded[name] = _padded(state[name], 0, widest)
        else:
            layer = key.removeprefix(PREFIX).rpartition(".lora_")[0]
            r = int(pattern_value(ranks, layer, config.r))
            scale = config.scaling(r, pattern_value(alphas, layer, config.lora_alpha))
            value = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
            folded[name] = _padded(value * scale, 1, widest)
    plain: dict[str, Any] = {
        "r": widest,
        "lora_alpha": widest,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
    return replace(facts, config=facts.config | plain), folded


def _padded(value: Tensor, dim: int, size: int) -> Tensor:
    """A matrix with zeros behind its rows (``dim`` 0) or columns (1)."""
    more = size - value.shape[dim]
    return torch.nn.functional.pad(value, (0, 0, 0, more) if dim == 0 else (0, more)) if more else value


def _of_linear(key: str, value: Tensor) -> bool:
    """Not of a convolution, and not of an attention, whose layers PEFT's names have inside another."""
    return key.endswith(_A + _B) and value.dim() == 2 and ".base_layer." not in key


def _refuse_other(facts: AdapterFacts, state: Mapping[str, Tensor]) -> None:
    """Raise what vLLM would say of the folder when it is asked to serve it."""
    config = facts.config
    problems = []
    if config.get("use_dora"):
        problems.append('use_dora: "vLLM does not yet support DoRA." Merge the adapter instead')
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        problems.append('bias: "Adapter bias is not supported."')
    if config.get("modules_to_save") or facts.outside:
        problems.append('modules_to_save: "vLLM only supports modules_to_save being None." Merge the adapter instead')
    others = ("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")
    problems += [f"{name}: vLLM knows plain adapters of layers only" for name in others if config.get(name)]
    odd = sorted(key for name, key in facts.keys.items() if not _of_linear(key, state[name]))
    if odd and not problems:
        problems.append(f"only lora_A and lora_B of layers are read there, not {', '.join(odd[:4])}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise AdapterError(f"fold_scaling=True writes for servers that know plain LoRA alone:{listed}")
