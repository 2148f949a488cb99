"""Embeddings that PEFT saves as a whole beside an adapter, for models that were given tokens."""

import json
import warnings

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import AdapterError, load_adapter

IDS = torch.arange(12)[None] + 20


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).double().eval()


def saved(folder, **fields):
    """Outputs of an adapter of PEFT's over a model whose last rows are its own, saved with the whole embeddings."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[-3:] += 0.5
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **fields)).eval()
    theirs.save_pretrained(folder, save_embedding_layers=True)
    return theirs(IDS).logits


def test_an_embedding_that_nothing_trains_is_named_with_what_to_do(tmp_path):
    wanted = saved(tmp_path, target_modules=["q_proj"])
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(AdapterError, match=r"all of model\.embed_tokens and lm_head .*modules_to_save"):
        load_adapter(model, tmp_path)
    assert [name for name, _ in model.named_parameters()] == names
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"modules_to_save": ["model.embed_tokens", "lm_head"]}
    file.write_text(json.dumps(config))
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, wanted)


def test_rows_that_the_base_has_not_are_told(tmp_path):
    wanted = saved(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(
        UserWarning, match=r"embed_tokens\.base_layer\.weight is not the base's weight in 3 rows \(first: 29"
    ):
        load_adapter(llama(), tmp_path)
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[-3:] += 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, wanted)
