"""Greedy text from a causal language model, leaving no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Continue each prompt with its likeliest tokens until the turn or the text ends.

    Modes of the modules and the states of the random generators are afterwards as they were before.

    Args:
        model: The model, on the device it is to run on.
        tokenizer: Its tokenizer; the side it pads on does not matter.
        prompts: Texts with all their special tokens in them, as a chat template renders them.
        max_new_tokens: At most so many tokens are added to each.

    Returns:
        What was added to each prompt, without special tokens and surrounding blanks.
    """
    if not prompts:
        return []
    # Padding on the left: what is generated must follow the prompt directly.
    batch = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    generator: Any = model  # transformers does not say in the type which models can generate
    with writing(model, tokenizer, max_new_tokens=max_new_tokens):
        output = generator.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            # A forward of a spread model is a meeting of all processes: each goes on until all have finished.
            synced_gpus=any(isinstance(parameter, DTensor) for parameter in model.parameters()),
        )
    added = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(added, skip_special_tokens=True)]


@contextmanager
def writing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[None]:
    """Have ``model.generate`` choose tokens as is said here, and leave no trace in the model or the random generators.

    What the model brings along in its ``generation_config`` (a penalty on repetition, several beams …) does not count.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which knows some of the tokens that end a text.
        max_new_tokens: At most so many tokens are added.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest one always.
        top_p: Tokens are drawn among the likeliest that together have this probability.
    """
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    own = model.generation_config
    told = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **draws,
    )
    # A compiled model would be compiled anew for every kind of cache it meets here.
    with isolate_rng(), evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        # In its place: handed to `generate`, it would be filled up from the model's.
        model.generation_config = told
        try:
            yield
        finally:
            model.generation_config = own


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode (which also switches gradient checkpointing off), and each part back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which there is nothing more to say: the model's, the tokenizer's, the chat template's."""
    own = model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return sorted(stop for stop in stops if stop is not None)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template puts behind an assistant's words."""
    if not tokenizer.chat_template:
        return None
    words = "so it is"
    turns = [{"role": "user", "content": "is it so"}, {"role": "assistant", "content": words}]
    try:
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(words)[2]
    except (TemplateError, ValueError):  # a template that wants other turns; the other stops have to do
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return next((token for token in tokenizer(behind, add_special_tokens=False)["input_ids"] if token in special), None)
