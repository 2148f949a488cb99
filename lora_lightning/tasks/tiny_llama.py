"""A Llama of 110 thousand random weights with a tokenizer and a chat template: the whole machinery, in a moment.

Everything is made by code from fixed seeds and does not depend on how a version of transformers initialises weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SEED = 0
_VOCABULARY = 384  # all of it is used: the text below is rich enough for so many merges
_PADDING, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SUBJECTS = ["the minister", "a small team", "our old river", "the new player", "her company", "every student"]
_VERBS = ["has won", "will open", "could not find", "is selling", "wrote about", "returns to", "answers with"]
_OBJECTS = ["the second game", "a better market", "his first record", "many good words", "the question", "a long story"]


def write_tiny_llama(folder: Path) -> None:
    """Write the model and its tokenizer to a folder, as transformers saves them."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    _model(tokenizer).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PADDING, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"system user assistant {a} {b} {c}." for a in _SUBJECTS for b in _VERBS for c in _OBJECTS]
    core.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PADDING,
        eos_token=_END,
        additional_special_tokens=[_START],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=64,
                intermediate_size=136,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return model
