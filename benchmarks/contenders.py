"""What is compared: ours, PEFT as shipped and tuned, the frozen floor, and the ladder between them.

All train the same weights with the same adapters (``B`` random: where it is zero, ``A`` has no gradient) on the same
batches. A contender is a `Spec`, which says in what it differs; a new one is one line.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-4
ROOT = Path(__file__).resolve().parent.parent
# What our callback sets for a whole process when a fit begins on the CPU: by name, the file and the function. Files,
# because their package would bring Lightning along, which a bare loop does without.
SWITCHES = {"allocator": ("lora_lightning/strategies/allocator.py", "keep_freed_memory")}


@dataclass(frozen=True)
class Spec:
    """In what contenders differ.

    Attributes:
        layer: Who adapts the layers: ``ours``, ``peft``, ``unsloth``, or ``none`` (the frozen floor).
        loss: ``ours`` (`causal_lm_loss`), ``hf`` (what the model's forward returns), ``sum`` (the forward itself).
        optimizer: ``fused`` or ``default`` AdamW.
        grouped: Batches of rows of like length, where the task has rows of unlike length.
        dropout: Of the adapters' inputs.
        r: Rank; alpha is twice that.
        dora: Magnitudes beside the adapters.
        base_dtype: Adapters in the base's dtype where that is a half one (PEFT as shipped holds them in float32).
        checkpointing: Activations are computed again in backward.
        liger: Liger's kernels in the model.
        switches: Names in `SWITCHES`.
    """

    layer: str = "ours"
    loss: str = "ours"
    optimizer: str = "fused"
    grouped: bool = True
    dropout: float = 0.05
    r: int = 16
    dora: bool = False
    base_dtype: bool = True
    checkpointing: bool = False
    liger: bool = False
    switches: tuple[str, ...] = ()


OURS = Spec()
PEFT_SHIPPED = Spec(layer="peft", loss="hf", optimizer="default", grouped=False, base_dtype=False)
PEFT_TUNED = Spec(layer="peft")
LIGER = Spec(layer="peft", loss="hf", liger=True)
UNSLOTH = Spec(layer="unsloth", loss="hf", dropout=0.0)  # its fast path has no dropout
# The floor has our loss, our optimizer and our settings of the process, and one leaf below the first layer.
FLOOR = replace(OURS, layer="none", dropout=0.0)
OURS_ON_CPU, FLOOR_ON_CPU = (replace(spec, switches=tuple(SWITCHES)) for spec in (OURS, FLOOR))
# On the CPU. Each level adds to the one before it; what the layer brings without dropout is measured beside it.
LADDER = {
    "PEFT as shipped": PEFT_SHIPPED,
    "+ layer": replace(PEFT_SHIPPED, layer="ours", base_dtype=True),
    "+ loss": replace(PEFT_SHIPPED, layer="ours", base_dtype=True, loss="ours"),
    "+ optimizer": replace(OURS, grouped=False),
    **{f"+ {name}": replace(OURS, grouped=False, switches=tuple(SWITCHES)[: i + 1]) for i, name in enumerate(SWITCHES)},
    "+ batching (all)": OURS_ON_CPU,
}


def why_not(spec: Spec) -> str | None:
    """Why a contender cannot be run here; None where it can."""
    needed = {"peft": "peft", "unsloth": "unsloth"}.get(spec.layer)
    for package in filter(None, (needed, "liger_kernel" if spec.liger else None)):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if spec.dora and spec.layer == "ours":
        from lora_lightning import LoraConfig

        if "use_dora" not in {entry.name for entry in fields(LoraConfig)}:
            return "LoraConfig has no use_dora"
    return None


def changes_all(spec: Spec) -> bool:
    """Whether a contender changes transformers for whatever else its process runs."""
    return spec.liger or spec.layer == "unsloth"


def switch_on(name: str) -> None:
    """Set what `SWITCHES` has under a name, for this process.

    Raises:
        RuntimeError: It could not be set: figures would be those of something else.
    """
    file, function = SWITCHES[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not getattr(module, function)():
        raise RuntimeError(f"{function} in {file} did nothing here (are MALLOC_… or LD_PRELOAD set?)")


class Contender:
    """A model that is ready to be trained, and its step.

    Args:
        spec: What it is.
        base: The model with its weights frozen; it is changed.
    """

    def __init__(self, spec: Spec, base: nn.Module) -> None:
        for name in spec.switches:
            switch_on(name)
        if spec.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=base)
        if spec.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.spec = spec
        self.model: nn.Module = ADAPT[spec.layer](base, spec).train()
        # Our loss asks the transformers model itself, not what PEFT puts around it.
        self.inner: nn.Module = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        same_adapters(self.adapters())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        options = {"fused": True} if spec.optimizer == "fused" else {}
        self.optimizer = torch.optim.AdamW(self.trained, LEARNING_RATE, **options) if self.trained else None

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch's supervised tokens, a scalar."""
        if self.spec.loss == "sum":
            return self.model([x.detach().requires_grad_() for x in batch])
        if self.spec.loss == "hf":
            return self.model(**batch).loss
        from lora_lightning.tasks.loss import causal_lm_loss

        told = causal_lm_loss(self.inner, batch)
        return told.total / told.terms

    def step(self, batch: Any) -> Tensor:
        """One optimizer step; returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def adapters(self) -> dict[str, dict[str, nn.Parameter]]:
        """The adapters by the name of their layer: ``A`` (r, in), ``B`` (out, r), and ``m`` (out,) with DoRA."""
        return dict(adapters_in(self.inner))

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """Gradients of all adapters for a batch without dropout, by ``layer/A`` and so on; nothing is updated."""
        self.model.eval()
        self.loss(batch).backward()
        self.model.train()
        told = {}
        for name, parts in self.adapters().items():
            for part, parameter in parts.items():
                assert parameter.grad is not None, f"{name}: {part} got no gradient"
                told[f"{name}/{part}"], parameter.grad = parameter.grad, None
        return told


def adapters_in(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """The adapted layers of a model, ours or PEFT's, with their parameters."""
    for name, module in model.named_modules():
        own = getattr(module, "lora_A", None)
        if isinstance(own, nn.Parameter):
            parts = {"A": own, "B": module.lora_B, "m": getattr(module, "lora_magnitude", None)}
        elif isinstance(own, nn.ModuleDict) and "default" in own:  # PEFT's
            magnitude = getattr(module, "lora_magnitude_vector", {})
            m = magnitude["default"].weight if "default" in magnitude else None
            parts = {"A": own["default"].weight, "B": module.lora_B["default"].weight, "m": m}
        else:
            continue
        yield name, {part: parameter for part, parameter in parts.items() if parameter is not None}


@torch.no_grad()
def same_adapters(adapters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Give every adapter the values that belong to its layer's name, whoever made it; magnitudes stay."""
    for name, parts in adapters.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for part, deviation in (("A", parts["A"].shape[1] ** -0.5), ("B", 0.02)):
            parts[part].copy_(torch.randn(parts[part].shape, generator=generator) * deviation)


# ---- who adapts


def _ours(base: nn.Module, spec: Spec) -> nn.Module:
    from lora_lightning import LoraConfig, inject_lora

    more: dict[str, Any] = {"use_dora": True} if spec.dora else {}
    inject_lora(base, LoraConfig(r=spec.r, lora_alpha=2 * spec.r, lora_dropout=spec.dropout, **more), seed=0)
    return base


def _peft(base: nn.Module, spec: Spec) -> nn.Module:
    import peft

    whole_model = hasattr(base, "get_output_embeddings")
    config = peft.LoraConfig(
        r=spec.r,
        lora_alpha=2 * spec.r,
        lora_dropout=spec.dropout,
        target_modules="all-linear" if whole_model else [name for name, _ in base.named_children()],
        use_dora=spec.dora,
    )
    return peft.get_peft_model(base, config, autocast_adapter_dtype=not spec.base_dtype)


def _unsloth(base: nn.Module, spec: Spec) -> nn.Module:
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(folder, dtype=base.dtype, load_in_4bit=False)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=spec.r, lora_alpha=2 * spec.r, lora_dropout=spec.dropout, target_modules=kinds
    )


def _nothing(base: nn.Module, spec: Spec) -> nn.Module:
    """The floor: all frozen, and a leaf added to the first layer's input, so that backward reaches down to it."""
    if not hasattr(base, "get_input_embeddings"):
        return base
    embedding = base.get_input_embeddings()
    base.below_all = nn.Parameter(embedding.weight.new_zeros(embedding.weight.shape[1]))
    embedding.register_forward_hook(lambda module, inputs, output: output + base.below_all)
    return base


# By `Spec.layer`.
ADAPT: dict[str, Callable[[nn.Module, Spec], nn.Module]] = {
    "ours": _ours,
    "peft": _peft,
    "unsloth": _unsloth,
    "none": _nothing,
}
