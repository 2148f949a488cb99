"""Packed rows against the same examples apart, in float64, for architectures that keep them apart in different ways."""

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_lightning.data.loaders import Collator
from lora_lightning.data.packing import PackingCollator
from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import CausalLM, packed_attention
from lora_lightning.tasks.loss import token_losses
from lora_lightning.tasks.packing import block_mask, find_route

EXACT = {"rtol": 1e-10, "atol": 1e-12}
BY_EXAMPLE = "attention example by example"
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
PACKABLE = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 5},
    "Qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Gemma3": {**GROUPED, "head_dim": 8, "sliding_window": 5},  # its layers are of two kinds
    "GPT2": GPT,  # positions are learned
    "GPTNeoX": {},
    "GPTBigCode": GPT,  # attention gets no position_ids
    "Persimmon": {},  # the same
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # its mask ignores position_ids
    "Falcon": {"alibi": False},  # the same
}
UNPACKABLE = {
    "Falcon": {"alibi": True},
    "Bart": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
    },
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mamba": {"state_size": 8},
}  # fmt: skip


def make(name, dtype=torch.float64, **changes):
    settings = {**COMMON, **PACKABLE.get(name, UNPACKABLE.get(name, {})), **changes}
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    torch.manual_seed(1)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + head)(getattr(transformers, kind + "Config")(**settings))
    for parameter in model.parameters():  # much larger than they are drawn: what tokens say of each other has to count
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.to(dtype).eval()


def examples_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": torch.where(ids % 3 == 0, -100, ids)} for ids in rows]


def pack(*rows, **options):
    return PackingCollator(**options)(rows)


def losses(model, batch):
    return token_losses(model, batch).losses_K


def score_of(model):
    return lambda batch: losses(model, batch)


def gradients(model, *loss):
    model.zero_grad()
    for one in loss:
        one.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_losses(model, batch):
    """Of a batch by the route that is found, and their gradients."""
    route = find_route(model, score_of(model))
    route.enter()
    found = losses(model, route.prepare(batch))
    moved = gradients(model, found)
    route.leave()
    return found.detach(), moved


def apart_losses(model, examples):
    device = next(model.parameters()).device
    batches = [{name: value.to(device) for name, value in Collator()([example]).items()} for example in examples]
    each = [losses(model, batch) for batch in batches]
    return torch.cat(each).detach(), gradients(model, *each)


def check_equal(one, other, exact=EXACT):
    torch.testing.assert_close(one[0], other[0], **exact)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], **exact, msg=lambda text, name=name: f"{name}: {text}")


def exactly(name):
    return {"rtol": 1e-5, "atol": 1e-6} if name == "Gemma3" else EXACT  # its norms compute in float32


@pytest.mark.parametrize("name", PACKABLE)
def test_losses_and_gradients_are_those_of_the_examples_apart(name):
    model, examples = make(name), examples_of(9, 14, 3, 21, 8)
    batch = pack(examples[:3], examples[3:], pad_to_multiple_of=8)  # 26 and 29 tokens in rows of 32
    assert batch["input_ids"].shape == (2, 32)
    check_equal(packed_losses(model, batch), apart_losses(model, examples), exactly(name))


@pytest.mark.parametrize("name", PACKABLE)
def test_an_example_changes_no_loss_of_another(name):
    model, examples = make(name), examples_of(9, 14, 7)
    route = find_route(model, score_of(model))
    route.enter()
    for number in range(3):
        changed = list(examples)
        changed[number] = examples_of(len(examples[number]["input_ids"]), seed=number + 7)[0]
        found = []
        for each in (examples, changed):
            batch = pack(each)
            batch["labels"] = torch.where(batch["position_ids"] == 0, -100, batch["input_ids"])
            with torch.no_grad():
                found.append(losses(model, route.prepare(batch)).split([8, 13, 6]))
        for place, (before, after) in enumerate(zip(*found, strict=True)):
            assert torch.equal(before, after) == (place != number)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma3", "GPTNeoX"])
def test_usual_models_attend_example_by_example(name):
    model = make(name, torch.float32)
    assert find_route(model, score_of(model)).told == BY_EXAMPLE


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_mix_a_row_are_refused_by_name(name):
    model = make(name, torch.float32, **UNPACKABLE[name])
    with pytest.raises(LoraConfigError, match=f"{name}ForCausalLM cannot be trained on packed(.|\n)*packing=false"):
        find_route(model, score_of(model))
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Gemma3"])
@pytest.mark.parametrize("lengths", [(30,), (30, 12)])
def test_windows_reach_no_further_where_a_row_has_one_example(name, lengths):
    model, wide = (
        make(name),
        make(name, **({"use_sliding_window": False} if name == "Qwen2" else {"sliding_window": 99})),
    )
    examples = examples_of(*lengths)
    found = packed_losses(model, pack(examples))
    check_equal(found, apart_losses(model, examples), exactly(name))
    assert not torch.allclose(found[0], apart_losses(wide, examples)[0], atol=1e-3)


def test_chunks_reach_no_further_where_a_row_has_one_example():
    chunked = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**{**COMMON, **chunked, "attention_chunk_size": 5, "num_hidden_layers": 1})
    torch.manual_seed(1)
    model = transformers.Llama4ForCausalLM(config).eval()
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # chunks are counted from the row's beginning
        with pytest.raises(LoraConfigError, match="losses differ"):
            find_route(model, score_of(model))
        return
    route = find_route(model, score_of(model))
    examples = examples_of(30)
    route.enter()
    found = losses(model, route.prepare(pack(examples)))
    route.leave()
    torch.testing.assert_close(found, losses(model, Collator()(examples)), rtol=1e-5, atol=1e-5)
    config.attention_chunk_size = 99
    assert not torch.allclose(found, losses(model, Collator()(examples)), rtol=1e-5, atol=1e-5)


def test_capped_scores_are_left_to_the_model():
    model = make("Gemma2", torch.float32, **GROUPED, head_dim=8, sliding_window=5, attn_implementation="eager")
    route = find_route(model, score_of(model))
    assert not route.configs
    with pytest.raises(NotImplementedError, match="softcap"):
        packed_attention.packed_attention(model, *torch.zeros(3, 1, 1, 4, 8), None, softcap=50.0)


def test_sinks_are_left_to_the_model():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = make("GptOss", torch.float32, **GROUPED, head_dim=8, sliding_window=5, **experts)
    examples = examples_of(12, 9)
    found, apart = packed_losses(model, pack(examples)), apart_losses(model, examples)
    torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def test_each_example_costs_its_own_length_only(monkeypatch):
    seen, attend = [], packed_attention._sdpa

    def watched(module, query, *others, **options):
        seen.append(tuple(query.shape))
        return attend(module, query, *others, **options)

    model = make("Llama")
    route = find_route(model, score_of(model))
    assert route.told == BY_EXAMPLE
    monkeypatch.setattr(packed_attention, "_sdpa", watched)
    route.enter()
    losses(model, route.prepare(pack(examples_of(9, 4), examples_of(6, 7))))
    assert seen == [(1, 4, length, 8) for length in (9, 4, 6, 7)] * 2


def test_attention_dropout_is_kept():
    model = make("Llama", attention_dropout=0.5)
    batch = pack(examples_of(9, 14))
    route = find_route(model, score_of(model))
    route.enter()
    still = losses(model, batch)
    model.train()
    torch.manual_seed(3)
    drawn, again = losses(model, batch), losses(model, batch)
    torch.manual_seed(3)
    assert torch.equal(drawn, losses(model, batch))
    assert not torch.allclose(drawn, again)
    assert not torch.allclose(drawn, still)


def test_checkpointed_layers_are_run_again_with_the_same_edges():
    model, examples = make("Llama"), examples_of(9, 14, 3)
    apart = apart_losses(model, examples)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    route = find_route(model.train(), score_of(model))
    route.enter()
    first, other = losses(model, pack(examples)), losses(model, pack(examples_of(5, 5, 5, 11)))  # an edge elsewhere
    check_equal((first.detach(), gradients(model, first)), apart)
    other.sum().backward()


def test_compiled_models_get_a_mask():
    model, examples = make("Llama", num_hidden_layers=1), examples_of(9, 14, 3)
    apart = apart_losses(model, examples)
    model.compile(backend="eager", dynamic=True)
    check_equal(packed_losses(model, pack(examples)), apart)


def test_flat_rows_and_given_masks():
    positions = pack(examples_of(3, 2), examples_of(4))["position_ids"]
    seen = block_mask(positions, torch.bool)[:, 0]
    assert seen[0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert torch.equal(seen[1], torch.block_diag(torch.ones(4, 4), torch.ones(1, 1)).tril().bool())
    assert torch.equal(block_mask(positions, torch.float32)[:, 0] == 0, seen)
    assert block_mask(positions, torch.bool, window=2)[0, 0, 2].int().tolist() == [0, 1, 1, 0, 0]


def test_the_trial_leaves_no_trace():
    model = make("Llama", torch.float32, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, drawn = [part.training for part in model.modules()], torch.get_rng_state()
    find_route(model, score_of(model))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_tried_too(precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = make("Llama", dtype)
    assert find_route(model, score_of(model)).told == BY_EXAMPLE
    leaking = make("Bloom", dtype)
    with pytest.raises(LoraConfigError):
        find_route(leaking, score_of(leaking))


class Watch(Callback):
    """Writes down which attention was used by the training and by the texts of validations."""

    def __init__(self):
        self.training, self.writing, self.validating = set(), set(), set()

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.training.add(module.model.config._attn_implementation)

    def on_validation_batch_end(self, trainer, module, *args):
        self.validating.add(module.model.config._attn_implementation)

    def on_validation_end(self, trainer, module):
        with torch.no_grad():
            module.generate_text(["x"], 2)
        self.writing.add(module.model.config._attn_implementation)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def fit(tmp_path, batches, validation=None, steps=4, watch=(), **settings):
    torch.manual_seed(0)
    module = CausalLM("demo:tiny-llama", optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(watch), num_sanity_val_steps=0,
        **settings,
    )  # fmt: skip
    trainer.fit(module, loader(batches), validation and loader(validation))
    return module, trainer


def test_a_fit_on_packed_rows_learns_what_one_on_padded_rows_does(tmp_path):
    examples = examples_of(9, 14, 3, 21, 8, 5)
    packed, padded = pack(examples[:3], examples[3:]), Collator()(examples)
    watch = Watch()
    one, trainer = fit(tmp_path, [packed], [padded], watch=[watch], max_epochs=4)
    other, usual = fit(tmp_path, [padded], max_epochs=4)
    for (name, ours), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.callback_metrics["train_loss"] == pytest.approx(
        float(usual.callback_metrics["train_loss"]), rel=1e-5
    )
    assert one.tokens_seen == other.tokens_seen == 4 * sum(len(each["input_ids"]) for each in examples)
    assert watch.training == {packed_attention.NAME}
    assert watch.validating == watch.writing == {"sdpa"}
    assert one.model.config._attn_implementation == "sdpa"


def test_accumulated_packed_batches_are_one(tmp_path):
    examples = examples_of(9, 14, 3, 21, 8, 5)
    whole, _ = fit(tmp_path, [pack(examples[:3], examples[3:])], steps=1)
    parts, _ = fit(tmp_path, [pack(examples[:3]), pack(examples[3:])], steps=1, accumulate_grad_batches=2)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_packed_rows_are_validated_and_scored(tmp_path):
    module = CausalLM("demo:tiny-llama")
    examples = examples_of(9, 14)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    [packed] = trainer.validate(module, loader([pack(examples)]), verbose=False)
    [padded] = trainer.validate(module, loader([Collator()(examples)]), verbose=False)
    assert packed["val_loss"] == pytest.approx(padded["val_loss"], rel=1e-5)
    assert module.predict_step(pack(examples)).shape == (1,)
    assert module.model.config._attn_implementation == "sdpa"


def test_a_mask_beside_packed_rows_is_refused(tmp_path):
    module, padded = CausalLM("demo:tiny-llama"), Collator()(examples_of(9, 14))
    with torch.no_grad():
        expected = module.loss_sum(padded).total
        positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        torch.testing.assert_close(module.loss_sum({**padded, "position_ids": positions}).total, expected)
        packed = pack(examples_of(9, 14))
        with pytest.raises(LoraConfigError, match="leave it out of the batch"):
            module.loss_sum({**packed, "attention_mask": torch.ones_like(packed["input_ids"])})


def test_registered_beside_the_models_own():
    assert ALL_ATTENTION_FUNCTIONS[packed_attention.NAME] is packed_attention.packed_attention


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    model, examples = make("Llama", dtype, hidden_size=128, head_dim=32).cuda(), examples_of(90, 140, 30, 210, 80)
    batch = {name: each.cuda() for name, each in pack(examples[:3], examples[3:]).items()}
    route = find_route(model, score_of(model))
    assert route.told == BY_EXAMPLE
    route.enter()
    found = losses(model, batch)
    moved = gradients(model, found)
    route.leave()
    apart, rough = apart_losses(model, examples)  # in the same precision
    exact = make("Llama", torch.float64, hidden_size=128, head_dim=32)
    exact.load_state_dict(model.state_dict())
    theirs, wanted = apart_losses(exact, examples)
    check_error(found, apart, theirs)
    for name, gradient in moved.items():
        check_error(gradient, rough[name], wanted[name])


def check_error(one, other, exact):
    """That one is about as near to the exact values as the other, of the same precision, is."""
    error, usual = ((each.detach().double().cpu() - exact).norm() for each in (one, other))
    assert error <= 2 * usual + 1e-3 * exact.norm()
