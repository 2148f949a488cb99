"""Activated LoRA against PEFT's, against its definition, and in all the ways in which a text can come to a model."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import lightning.pytorch as pl
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_lightning import (
    AdapterError,
    LoraCallback,
    LoraConfig,
    LoraConfigError,
    causal_lm_loss,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.layers.alora import ALoraLinear
from lora_lightning.layers.invocation import Invocation, _last_start, _texts

TOKENS = [5, 6]
# Rows with the tokens in the middle, twice, at the end, only half of them, and not at all.
IDS = torch.tensor(
    [
        [1, 2, 5, 6, 3, 4, 9, 8],
        [5, 6, 1, 2, 5, 6, 7, 7],
        [0, 0, 0, 4, 3, 2, 5, 6],
        [5, 5, 1, 6, 6, 2, 1, 5],
        [9, 8, 7, 1, 2, 3, 4, 1],
    ]
)
FIRST = [2, 4, 6, 8, 8]
"""From where on the adapter is in force."""


def llama(dtype=torch.float64):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=12, **sizes, max_position_embeddings=64, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64)).double().eval()


SETTINGS = {"r": 3, "lora_alpha": 12, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def adapted(model=None, seed=1, **more):
    model = llama() if model is None else model
    inject_lora(model, LoraConfig(**SETTINGS, alora_invocation_tokens=TOKENS, **more), seed=seed)
    return model


def by_definition(model, ids, starts=FIRST):
    """Every row by itself: the base up to where the adapter is in force, which goes on with the base's keys."""
    rows = []
    for row, start in zip(ids, starts, strict=True):
        cache = DynamicCache()
        parts = []
        if start:
            with lora_disabled(model):
                parts.append(model(row[None, :start], past_key_values=cache).logits[0])
        if start < len(row):
            rest = {"past_key_values": cache, "alora_offsets": [len(row) - start]}
            parts.append(model(row[None, start:], **rest).logits[0])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_outputs_and_gradients_are_those_of_peft(make, tmp_path):
    model = adapted(make(), target_modules="all-linear")
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    assert theirs.peft_config["default"].alora_invocation_tokens == TOKENS
    ours, wanted = model(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(ours, wanted)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in lora_parameters(model).items():
        torch.testing.assert_close(parameter.grad, grads[f"base_model.model.{name}.weight"], msg=name)


def test_outputs_are_those_of_the_definition_and_the_bases_before_it():
    model = adapted()
    with torch.no_grad():
        out = model(IDS).logits
        torch.testing.assert_close(out, by_definition(model, IDS))
        with lora_disabled(model):
            base = model(IDS).logits
    assert torch.equal(base, llama()(IDS).logits)
    for row, first in enumerate(FIRST):
        assert torch.equal(out[row, :first], base[row, :first])
        assert not any(torch.allclose(out[row, t], base[row, t]) for t in range(first, 8))


def test_a_file_of_peft_is_read(tmp_path):
    torch.manual_seed(4)
    config = peft.LoraConfig(**SETTINGS, alora_invocation_tokens=TOKENS, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(llama(), config).double().eval()
    theirs.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits)


# ---- a text in parts


def test_generation_is_that_of_peft_with_a_cache_and_needs_none(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    out = model.generate(IDS, **options)
    assert torch.equal(out, theirs.generate(input_ids=IDS, **options))
    made = out[:, 8:]
    assert not any(made[row, t : t + 2].tolist() == TOKENS for row in range(5) for t in range(5))
    assert torch.equal(out, model.generate(IDS, use_cache=False, **options))
    assert torch.equal(out, model.generate(IDS, cache_implementation="static", **options))
    with lora_disabled(model):
        assert not torch.equal(out, model.generate(IDS, **options))


def test_beam_search_with_a_cache_and_without():
    model = adapted()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("cuts", [(4,), (3,), (5,), (2, 4, 6), (3, 6)])
def test_a_prompt_in_parts(cuts):
    """Where a cut goes through the tokens, the part before it has been computed when they are whole."""
    model, ids = adapted(), IDS[[0, 2, 3, 4]]
    cache = DynamicCache()
    edges = itertools.pairwise([0, *cuts, 8])
    found = torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in edges], dim=1)
    starts = [next((cut for cut in cuts if cut == first + 1), first) for first in (2, 6, 8, 8)]
    torch.testing.assert_close(found, by_definition(model, ids, starts))


def test_a_cache_that_the_model_makes_itself_goes_on():
    model = adapted()
    whole = model(torch.cat([IDS, IDS[:, 2:4]], 1)[:, :9])
    first = model(IDS, use_cache=True)
    then = model(torch.cat([IDS, IDS[:, 2:4]], 1)[:, 8:9], past_key_values=first.past_key_values)
    rows = [0, 1, 2, 4]
    torch.testing.assert_close(then.logits[rows, -1], whole.logits[rows, -1])


@pytest.mark.parametrize("tokens", [TOKENS, [6]])
def test_token_by_token_is_the_whole(tokens):
    """Where the last token of the invocation comes by itself, the tokens before it have been the base's."""
    model = llama()
    inject_lora(model, LoraConfig(**SETTINGS, alora_invocation_tokens=tokens), seed=1)
    row, cache = IDS[2:3], DynamicCache()  # the invocation ends it
    parts = [model(row[:, t : t + 1], past_key_values=cache).logits for t in range(8)]
    torch.testing.assert_close(torch.cat(parts, 1), by_definition(model, row, [7]))
    with lora_disabled(model):
        cache = model(row[:, :7], use_cache=True).past_key_values
    told = model(row[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(told, parts[-1])


@torch.no_grad()
def test_a_copy_of_a_cache_knows_what_the_text_has_come_to():
    model = adapted()
    cache = model(IDS[:, :7], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    assert torch.equal(
        model(IDS[:, 7:], past_key_values=copied).logits, model(IDS[:, 7:], past_key_values=cache).logits
    )
    model(IDS[:, :2], past_key_values=copied)
    assert copied.get_seq_length() == cache.get_seq_length() + 2


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 3, 4, 6])
def test_tokens_that_are_taken_back_are_forgotten(kept):
    """Before the invocation, in it and after it; speculative decoding does so with what was not to come."""
    model = adapted()
    row = IDS[:1]  # invoked at 2
    cache, wanted = DynamicCache(), DynamicCache()
    parts = (row[:, :3], row[:, 3:])  # a key that was computed after the invocation began stays what it is
    for part in parts:
        model(part, past_key_values=cache)
    cache.crop(kept - 8)
    for part in (row[:, :kept][:, :3], row[:, 3:kept]):
        if part.shape[1]:
            model(part, past_key_values=wanted)
    for then in ([[1]], [[6, 1]], [[5]], [[6]]):
        told = model(torch.tensor(then), past_key_values=cache).logits
        torch.testing.assert_close(told, model(torch.tensor(then), past_key_values=wanted).logits)
    cache.crop(-cache.get_seq_length())
    torch.testing.assert_close(model(IDS[4:], past_key_values=cache).logits, model(IDS[4:]).logits)


def test_a_cache_of_the_base_is_taken_over():
    """What the method is for: the base has read the text, and the adapter is invoked on it."""
    model = adapted()
    cache = llama()(IDS[:, :4], use_cache=True).past_key_values
    told = torch.tensor([[5, 6, 1]] * 5)
    out = model(told, past_key_values=cache).logits
    text = torch.cat([IDS[:, :4], told], 1)
    torch.testing.assert_close(out, by_definition(model, text, [4] * 5)[:, 4:])


def test_the_head_alone_of_some_positions():
    model = adapted(target_modules=["q_proj", "lm_head"])
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, whole[:, -3:])
    kept = torch.tensor([1, 5, 6])
    torch.testing.assert_close(model(IDS, logits_to_keep=kept).logits, whole[:, kept])


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_the_last_appearance_in_each_text_of_a_row_is_found(texts, tokens):
    n, ids, positions, wanted = len(tokens), [], [], []
    for text in texts:
        hits = [i for i in range(len(text) - n + 1) if text[i : i + n] == tokens]
        wanted += [len(ids) + max(hits) if hits else -1] * len(text)
        positions += range(len(text))
        ids += text
    ids, positions = torch.tensor([ids]), torch.tensor([positions])
    assert _last_start(ids, tokens, _texts(ids, positions)).tolist() == [wanted]


def test_several_texts_in_a_row_do_not_see_each_others_tokens():
    model = adapted()
    texts = [IDS[0, :6], IDS[4, :5], IDS[2, 3:]]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    packed = model(torch.cat(texts)[None], position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(packed[0], alone)


# ---- training


def test_training_moves_it_and_the_loss_needs_no_logits():
    model = adapted().train()
    batch = {"input_ids": IDS, "labels": IDS.clone()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would be told that logits are made in full
        loss = causal_lm_loss(model, batch).mean
    torch.testing.assert_close(loss.float(), model(**batch).loss)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in lora_parameters(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    plain, model = adapted().train(), adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ignored = model(IDS.flip(0))  # a forward without a backward, let go
    del ignored
    for each in (plain, model):
        each(IDS).logits.square().sum().backward()
    for name, parameter in lora_parameters(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    kept = []  # a graph that is still there, and has been through
    for ids in (IDS, IDS.flip(0)):
        plain.zero_grad(), model.zero_grad()
        plain(ids).logits.square().sum().backward()
        kept.append(model(ids).logits.square().sum())
        kept[-1].backward()
        for name, parameter in lora_parameters(plain).items():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    one, other = model(IDS).logits, model(IDS.flip(1)).logits
    with pytest.raises(LoraConfigError, match="backward after each forward"):
        (one.square().sum() + other.square().sum()).backward()


def test_a_batch_without_the_tokens_has_gradients_of_zero():
    model = adapted()
    model(IDS[4:]).logits.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in lora_parameters(model).values())


# ---- other ways to call


def test_the_backbone_by_itself_and_offsets_as_peft_takes_them():
    model = adapted()
    whole = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(model.model(IDS).last_hidden_state, whole.hidden_states[-1])
    offsets = [8 - first or None for first in FIRST]
    torch.testing.assert_close(model(IDS, alora_offsets=offsets).logits, whole.logits)
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embedded, alora_offsets=offsets).logits, whole.logits)
    with pytest.warns(UserWarning, match="Give input_ids"):
        base = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(base, llama()(IDS).logits)


def test_layers_by_themselves_are_refused():
    model = adapted()
    with pytest.raises(LoraConfigError, match="called by itself"):
        model.model.layers[0].self_attn.q_proj(torch.randn(1, 2, 16).double())

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.expert = nn.Embedding(12, 4), nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.expert(self.emb(input_ids).flatten(0, 1)[:3])

    mixture = Mixture()
    inject_lora(mixture, LoraConfig(alora_invocation_tokens=TOKENS, target_modules=["expert"]))
    with pytest.raises(LoraConfigError, match="exclude_modules"):
        mixture(IDS)
    assert isinstance(mixture.expert, ALoraLinear)


def test_a_call_that_fails_leaves_nothing_behind():
    model = adapted()
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 99))
    torch.testing.assert_close(model(IDS).logits, by_definition(model, IDS))


def test_compiled():
    model = adapted()
    wanted = model(IDS).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(IDS).logits, wanted)


SPREAD = """
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from lora_lightning import LoraConfig, inject_lora, lora_parameters
from lora_lightning.injection.tensors import whole
from lora_lightning.strategies.parallelize import shard

ids = torch.arange(7, 25).view(2, 9)
ids[0, 3:5] = torch.tensor([5, 6])


def network():
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    ))
    inject_lora(model, LoraConfig(r=4, alora_invocation_tokens=[5, 6], init_lora_weights=False), seed=1)
    return model.train()


def results(model):
    logits = model(ids).logits
    logits.logsumexp(-1).square().mean().backward()
    return whole(logits.detach()), {name: whole(p.grad) for name, p in lora_parameters(model).items()}


logits, gradients = results(network())
for sizes in ((2, 1), (1, 2)):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))
    for again in (False, True):
        given, given_gradients = results(shard(network(), mesh, activation_checkpointing=again))
        assert (given - logits).abs().max() < 1e-5 * logits.abs().max()
        for name, gradient in gradients.items():
            assert (given_gradients[name] - gradient).abs().max() < 1e-6, name
"""


@pytest.mark.slow
def test_under_fsdp2_and_tensor_parallel(processes):
    processes(SPREAD)


def test_in_a_trainer_it_is_trained_saved_and_resumed(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama(torch.float32)

        def training_step(self, batch, batch_idx):
            return causal_lm_loss(self.model, {"input_ids": batch, "labels": batch}).mean

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fit(epochs, ckpt=None):
        module = Module()
        callback = LoraCallback(LoraConfig(r=3, alora_invocation_tokens=TOKENS, task_type="CAUSAL_LM"))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / f"{epochs}{bool(ckpt)}",
            callbacks=[callback],
        )
        trainer.fit(module, DataLoader(IDS, batch_size=2), ckpt_path=ckpt)
        return module, callback, trainer

    whole, callback, _ = fit(2)
    _, _, begun = fit(1)
    resumed, _, _ = fit(2, begun.checkpoint_callback.best_model_path)
    for name, value in lora_parameters(whole).items():
        assert torch.equal(resumed.get_parameter(name), value)
    theirs = peft.PeftModel.from_pretrained(llama(torch.float32), callback.adapter_path).eval()
    torch.testing.assert_close(whole.model.eval()(IDS).logits, theirs(input_ids=IDS).logits)


# ---- as other adapters


def test_merging_is_refused_and_unloading_leaves_the_base():
    model = adapted()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="in force from its invocation tokens on"):
        merge_lora(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    unload_lora(model)
    plain = llama()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called))
        assert not any("lora" in name for name in vars(module))
    adapted(model)


def test_copies_know_their_own_calls():
    model = adapted()
    wanted = model(IDS).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        held = {id(m.lora_invocation) for m in twin.modules() if isinstance(m, ALoraLinear)}
        assert len(held) == 1
        assert held != {id(m.lora_invocation) for m in model.modules() if isinstance(m, ALoraLinear)}
        torch.testing.assert_close(twin(IDS).logits, wanted)
    assert copy.deepcopy(Invocation([1, 2])).tokens == (1, 2)


def test_half_precision_and_a_bias_of_b(tmp_path):
    model = adapted(llama(torch.bfloat16))
    assert model(IDS).logits.dtype == torch.bfloat16
    model = adapted(target_modules=["q_proj", "down_proj"], lora_bias=True)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith("bias"):
                parameter.normal_()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "does not go with use_dora"),
        ({"target_modules": ["embed_tokens"]}, "alora_invocation_tokens does not go with a layer of class Embedding"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_does_not_go_together(more, message):
    model = llama()
    with pytest.raises(LoraConfigError, match=message):
        inject_lora(model, LoraConfig(**(SETTINGS | {"alora_invocation_tokens": TOKENS} | more)))
    assert not any("lora" in name for module in model.modules() for name in vars(module))


def test_an_encoder_decoder_is_refused():
    model = llama()
    model.config.is_encoder_decoder = True
    with pytest.raises(LoraConfigError, match="is for decoders"):
        adapted(model)
    assert not any("lora" in name for module in model.modules() for name in vars(module))
