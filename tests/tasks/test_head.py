"""Losses of many architectures, and of models that do what none is known to, against their own full logits."""

import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from lora_lightning import LoraConfig, inject_lora, lora_disabled
from lora_lightning.layers import LoraLinear
from lora_lightning.tasks.loss import causal_lm_loss, token_losses

V = 67
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2}
ALIKE = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
ARCHITECTURES = {
    "Llama": SIZES,
    "Qwen2": {**SIZES, "tie_word_embeddings": True},
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 1.5},
    "Gemma3": {**SIZES, "head_dim": 8, "final_logit_softcapping": 2.5},
    "RecurrentGemma": {**SIZES, "head_dim": 8, "num_hidden_layers": 3, "lru_width": 16},
    "Cohere": {**SIZES, "logit_scale": 0.3},
    "Granite": {**SIZES, "logits_scaling": 13.0},
    "Phi": ALIKE,
    "GPTJ": {**SMALL, "rotary_dim": 4},
    "GPT2": SMALL,
    "GPTNeoX": ALIKE,
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **ALIKE},
    "Olmo2": SIZES,
    "Mpt": {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 1, "logit_scale": "inv_sqrt_d_model"},
    "Bloom": {"vocab_size": V, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "Falcon": ALIKE,
    "Mixtral": {**SIZES, "num_local_experts": 4, **EXPERTS},
    "Qwen2Moe": {
        **SIZES,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        **EXPERTS,
    },
}
# These go through float32 on their way, whatever their dtype.
ROUNDED = ("GPTJ",)


def build(name, **changes):
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    config = config(**ARCHITECTURES[name], **changes)
    config._attn_implementation = config._experts_implementation = "eager"
    return shaken(kind(config))


def shaken(model):
    """In float64, with no weight at 0 or 1, where mistakes would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture
def batch():
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1] = labels[2, 5:7] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def reference(model, batch, **options):
    """The loss by all logits of the model's own forward; the auxiliary loss, too."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    logits = output.logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits.double(), batch["labels"][:, 1:].flatten(), **options)
    return loss if getattr(output, "aux_loss", None) is None else loss + 0.5 * output.aux_loss


def gradients(loss, model):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(trained.items(), found, strict=True)
    }


def assert_equal(model, batch, tolerance=1e-10, **options):
    loss = causal_lm_loss(model, batch, **options).mean
    expected = reference(model, batch, **options)
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=0, check_dtype=False)
    theirs = gradients(expected, model)
    torch.testing.assert_close(gradients(loss, model), theirs, atol=tolerance, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())


def logits_were_made(model, batch):
    return token_losses(model, batch).outputs.logits.shape[1] > 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, batch):
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(model, batch, 1e-7 if name in ROUNDED else 1e-10)
        assert not logits_were_made(model, batch)
    single = model.float()
    output = single(**batch)  # transformers' own loss, which is always in float32
    torch.testing.assert_close(causal_lm_loss(single, batch).mean, output.loss, atol=1e-6, rtol=0)
    if name not in ROUNDED:
        assert_equal(single, batch, 1e-6)


def test_smoothing_goes_through_cap_and_scale(batch):
    assert_equal(build("Gemma2"), batch, label_smoothing=0.1)
    assert_equal(build("Granite"), batch, label_smoothing=0.1)


def test_nothing_as_large_as_the_logits(batch):
    """Neither in training nor in evaluation is a tensor made as large as the logits of all positions."""
    heights = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)]
            heights.extend(t.numel() // V for t in found if t.shape[-1:] == (V,) and t.shape != (16, V))  # the weight
            return out

    model = build("Llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    batch["labels"][2] = -100  # leaves 5 of 27 positions
    causal_lm_loss(model, batch)
    with Watch():
        causal_lm_loss(model, batch).mean.backward()
        with torch.no_grad():
            causal_lm_loss(model, batch)
    assert max(heights) == 5


# Models that do more to their logits


class Masked(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.index_fill(-1, torch.tensor([5]), -30.0)
        return output


class Cut(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits[..., :-2]
        return output


class Assigned(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.clone()
        output.logits[..., 7] += 1.0
        return output


class Normalised(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = (output.logits * 2).log_softmax(-1) * 0.5
        return output


class Clamped(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits.clamp(-3, 3)
        return output


class Mixed(LlamaForCausalLM):
    """Each position's logits depend on the other's before."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits + 0.1 * output.logits.roll(1, dims=1)
        return output


class Reshaped(LlamaForCausalLM):
    """Wants as many logits as it has tokens."""

    def forward(self, input_ids, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits.view(*input_ids.shape, -1)
        return output


class Learned(LlamaForCausalLM):
    """Its scale trains, so that to know it is not enough."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits * self.temperature
        return output


class InPlace(Learned):
    def forward(self, **inputs):
        output = LlamaForCausalLM.forward(self, **inputs)
        output.logits *= self.temperature
        return output


class Twice(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits + self.lm_head(self.model(**inputs).last_hidden_state.flip(-1))
        return output


def wanting_names(kind):
    """Forwards written with ``**inputs``, for brevity, get the signature of the class above."""
    if kind is not Reshaped:
        kind.forward.__wrapped__ = LlamaForCausalLM.forward
    return kind


MORE = [Masked, Cut, Assigned, Normalised, Clamped, Mixed, Reshaped, Learned, InPlace, Twice]


@pytest.mark.parametrize("kind", MORE, ids=lambda kind: kind.__name__)
def test_logits_that_are_more_than_the_head_gives(kind, batch):
    wanting_names(kind)
    model = shaken(kind(LlamaConfig(**SIZES)))
    batch["labels"][batch["labels"] == V - 2] = 3
    batch["labels"][batch["labels"] == V - 1] = 3
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"{kind.__name__} makes its logits in full"):
        causal_lm_loss(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert_equal(model, batch)


class Halved(LlamaForCausalLM):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits *= -0.5
        return output


def test_a_scale_in_place(batch):
    model = shaken(wanting_names(Halved)(LlamaConfig(**SIZES)))
    assert_equal(model, batch)
    assert not logits_were_made(model, batch)


class Headless(LlamaForCausalLM):
    def get_output_embeddings(self):
        raise NotImplementedError


class OtherHead(LlamaForCausalLM):
    """A head whose forward nobody knows."""

    def __init__(self, config):
        super().__init__(config)

        class Head(nn.Linear):
            def forward(self, x):
                return super().forward(x).tanh()

        self.lm_head = Head(config.hidden_size, config.vocab_size)


class Unused(LlamaForCausalLM):
    """Its head is never called."""

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=functional.linear(hidden, self.lm_head.weight) * 0.5)


@pytest.mark.parametrize("kind", [Headless, OtherHead, Unused])
def test_heads_that_are_not_known(kind, batch):
    model = shaken(kind(LlamaConfig(**SIZES)))
    assert_equal(model, batch)
    assert logits_were_made(model, batch)


def test_what_is_known_of_a_model_does_not_grow_old(batch):
    model = build("Gemma2")
    for cap in (None, 0.7, 30.0, None):
        model.config.final_logit_softcapping = cap
        assert_equal(model, batch)
        assert not logits_were_made(model, batch)


def test_the_first_batch_draws_no_more_than_others():
    """Finding out about a model leaves its dropout where it would have been."""
    ids = torch.arange(20).reshape(2, 10)
    batch = {"input_ids": ids, "labels": ids}
    for kind, config in (
        (Gemma2ForCausalLM, Gemma2Config(**ARCHITECTURES["Gemma2"], attention_dropout=0.5)),
        (wanting_names(Masked), LlamaConfig(**SIZES, attention_dropout=0.5)),
    ):
        model = shaken(kind(config)).train()
        losses = []
        for _ in range(2):
            torch.manual_seed(3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses.append((causal_lm_loss(model, batch).mean, torch.rand(())))
        assert losses[0] == losses[1]


# Adapters and other training of the head


@pytest.mark.parametrize("name", ["Llama", "Granite", "Gemma2", "Phi"])
def test_adapter_on_the_head(name, batch):
    changes = {} if name != "Gemma2" else {"tie_word_embeddings": False}
    model = build(name, **changes)
    inject_lora(model, LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"]))
    assert type(model.lm_head) is LoraLinear
    shaken(model)
    assert_equal(model, batch)
    assert not logits_were_made(model, batch)
    with lora_disabled(model):
        model.requires_grad_(True)
        assert_equal(model, batch)


def test_dropout_of_the_heads_adapter(batch):
    model = build("Llama")
    inject_lora(model, LoraConfig(r=3, lora_dropout=0.5, target_modules=["lm_head"]))
    shaken(model)
    plain = causal_lm_loss(model, batch).mean
    model.train()
    with torch.no_grad():
        drawn = torch.stack([causal_lm_loss(model, batch).mean for _ in range(200)])
        expected = torch.stack([reference(model, batch) for _ in range(200)])
    assert drawn.std() > 1e-3
    error = (drawn.var() / 200 + expected.var() / 200).sqrt()
    assert (drawn.mean() - expected.mean()).abs() < 4 * error
    model.eval()
    assert causal_lm_loss(model, batch).mean == plain


def test_head_trained_in_full(batch):
    model = build("Phi")
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.bias.requires_grad
    assert_equal(model, batch)
    assert not logits_were_made(model, batch)


def test_bias_of_the_head_alone(batch):
    model = build("Phi").requires_grad_(False)
    model.lm_head.bias.requires_grad_(True)
    assert_equal(model, batch)


# Readers


def test_a_hook_on_the_head_sees_what_is_true(batch):
    model, seen = build("Llama"), []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    assert_equal(model, batch)
    assert len(seen) == 2
    for x, logits in seen:
        torch.testing.assert_close(logits, x @ model.lm_head.weight.T)
        assert logits.shape == (3, 9, V)
    handle.remove()
    assert not logits_were_made(model, batch)


def test_a_hook_on_the_model_sees_logits(batch):
    model, seen = build("Llama"), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    assert_equal(model, batch)
    assert [logits.shape for logits in seen] == [(3, 9, V)] * 2


def test_an_instances_own_forward_is_called(batch):
    """As accelerate puts one where it moves a layer's inputs."""
    model = build("Llama")
    model.lm_head.forward = lambda x: functional.linear(x, model.lm_head.weight) * 0.25
    assert_equal(model, batch)


def test_the_head_is_left_as_it_was(batch):
    model = build("Llama")
    causal_lm_loss(model, batch)
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(IndexError):
        causal_lm_loss(model, batch | {"input_ids": batch["input_ids"] + V})  # the batch is wrong, not the model
    assert "forward" not in vars(model.lm_head)
    assert not logits_were_made(model, batch)
    with pytest.raises((IndexError, RuntimeError)):
        causal_lm_loss(model, batch | {"labels": batch["labels"].clamp(min=0) + V})
    assert not logits_were_made(model, batch)
