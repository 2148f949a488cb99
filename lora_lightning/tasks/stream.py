"""Text from a causal language model while it is being written, leaving no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks.generate import writing


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Tokens of an answer, at most.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest one always.
        top_p: Tokens are drawn among the likeliest that together have this probability.
        seed: What is drawn begins from it, at each answer anew: the same question gets the same answer.

    Raises:
        LoraConfigError: A value makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        wrong = [
            text
            for bad, text in (
                (self.max_new_tokens < 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
                (not 0 <= self.temperature < float("inf"), f"temperature must be at least 0, got {self.temperature}"),
                (not 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
                (not 0 <= self.seed < 2**63, f"seed must be a whole number of at least 0, got {self.seed}"),
            )
            if bad
        ]
        if wrong:
            raise LoraConfigError("; ".join(wrong))


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    tell: Callable[[str], None],
) -> str:
    """Continue one prompt until the turn or the text ends, and tell each piece as soon as it is there.

    Modes of the modules and the states of the random generators are afterwards as they were before, also where ``tell``
    raises, which ends the text.

    Args:
        model: The model, on the device it is to run on.
        tokenizer: Its tokenizer.
        prompt: A text with all its special tokens in it, as a chat template renders it.
        sampling: How tokens are chosen.
        tell: Called with each piece of text, in order; pieces are whole words where the language has such.

    Returns:
        The whole text, without special tokens and surrounding blanks.

    Raises:
        LoraConfigError: The prompt leaves no room in what the model can read.
    """
    batch = tokenizer([prompt], add_special_tokens=False, return_tensors="pt")
    ids = batch["input_ids"].to(model.device)
    room = _most_positions(model) - ids.shape[1]
    if room < 1:
        raise LoraConfigError(
            f"the prompt has {ids.shape[1]:,} tokens, and this model reads {_most_positions(model):,} at most"
        )
    pieces = _Pieces(tokenizer, tell)
    length = min(sampling.max_new_tokens, room)
    generator: Any = model  # transformers does not say in the type which models can generate
    with writing(model, tokenizer, max_new_tokens=length, temperature=sampling.temperature, top_p=sampling.top_p):
        torch.manual_seed(sampling.seed)
        mask = batch["attention_mask"].to(model.device)
        generator.generate(input_ids=ids, attention_mask=mask, streamer=pieces)
    return pieces.text.strip()


class _Pieces(TextStreamer):
    """Gives on what is certain: a word, and of a character of several tokens nothing before the last one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece; the last one may be empty."""
        self.text += text
        if text:
            self._tell(text)


def _most_positions(model: PreTrainedModel) -> int:
    """How many tokens the model has been made for; endless where it does not say."""
    told = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return told if isinstance(told, int) and told > 0 else 2**31
