import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast

import lora_lightning
from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import CausalLM
from lora_lightning.tasks.loss import causal_lm_loss, token_losses


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_equals_hugging_face(module, rows):
    batch = stacked(rows)
    loss = causal_lm_loss(module.model, batch)
    torch.testing.assert_close(loss.mean, module.model(**batch).loss, atol=1e-6, rtol=0)
    assert loss.logits is None
    assert lora_lightning.causal_lm_loss is causal_lm_loss


def test_equals_hugging_face_where_padding_is_the_end_token(module, rows):
    """The trained end-of-turn token and the padding behind it are the same token; only the first is a label."""
    batch = stacked(rows)
    end = module.tokenizer.eos_token_id
    batch["input_ids"][batch["attention_mask"] == 0] = end
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(8), last] = end
    batch["labels"][torch.arange(8), last] = end
    loss = causal_lm_loss(module.model, batch)
    torch.testing.assert_close(loss.mean, module.model(**batch).loss, atol=1e-6, rtol=0)
    assert loss.terms == (batch["labels"][:, 1:] != -100).sum()


def test_counted_over_all_accumulated_batches(module, rows):
    """With the number of labels of a whole window, the losses of its batches add up to that of one batch."""
    batch = stacked(rows)
    parts = [stacked(rows[:3]), stacked(rows[3:])]
    count = (batch["labels"][:, 1:] != -100).sum()
    for number in (count, int(count)):
        losses = [causal_lm_loss(module.model, part, num_items_in_batch=number).mean for part in parts]
        theirs = [module.model(**part, num_items_in_batch=number).loss for part in parts]
        torch.testing.assert_close(losses, theirs, atol=1e-6, rtol=0)
        torch.testing.assert_close(sum(losses), module.model(**batch).loss, atol=1e-6, rtol=0)


def test_smooths_labels_as_torch_does(module, rows):
    batch = stacked(rows)
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(causal_lm_loss(module.model, batch, label_smoothing=0.2).mean, expected)


def test_each_loss_in_order(module, rows):
    batch = stacked(rows)
    losses_K = token_losses(module.model, batch).losses_K
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses_K, expected[targets != -100])


class Bare(nn.Module):
    """A model that can neither leave out positions nor be told about caches, around one that can."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return CausalLMOutput(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


class Own(nn.Module):
    """A network that has never heard of transformers."""

    def __init__(self, as_tuple):
        super().__init__()
        self.embedding, self.head = nn.Embedding(384, 8), nn.Linear(8, 384)
        self.as_tuple = as_tuple

    def forward(self, input_ids):
        logits = self.head(self.embedding(input_ids).cumsum(1))
        return (logits, None) if self.as_tuple else logits


def test_models_with_a_plain_forward(module, rows):
    batch = stacked(rows) | {"note": torch.zeros(8)}  # what a model does not take is kept from it
    loss, expected = causal_lm_loss(Bare(module.model), batch), causal_lm_loss(module.model, batch)
    torch.testing.assert_close(loss.total, expected.total)
    assert loss.terms == expected.terms


@pytest.mark.parametrize("as_tuple", [True, False])
def test_networks_of_ones_own(rows, as_tuple):
    batch, network = stacked(rows), Own(as_tuple)
    logits = network(batch["input_ids"])[0] if as_tuple else network(batch["input_ids"])
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = causal_lm_loss(network, batch).mean
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert network.head.weight.grad.abs().sum() > 0


def test_other_architecture_equals_hugging_face(rows):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=32)).eval()
    batch = stacked(rows)
    torch.testing.assert_close(causal_lm_loss(model, batch).mean, model(**batch).loss, atol=1e-6, rtol=0)


def test_no_label_at_all(module, rows):
    batch = stacked(rows)
    batch["labels"].fill_(-100)
    loss = causal_lm_loss(module.model, batch)
    assert loss.total == loss.terms == loss.mean == 0
    loss.total.backward()
    assert all((weight.grad == 0).all() for weight in module.model.parameters())


def test_positions_and_other_inputs_reach_the_model(module, rows):
    batch = stacked(rows)
    shifted = batch | {"position_ids": torch.arange(12).expand(8, 12) * 3}
    torch.testing.assert_close(causal_lm_loss(module.model, shifted).mean, module.model(**shifted).loss)
    assert abs(causal_lm_loss(module.model, shifted).mean - causal_lm_loss(module.model, batch).mean) > 1e-5
    # This is no parameter of its forward, but of what that takes by way of **kwargs.
    assert len(token_losses(module.model, batch | {"output_hidden_states": True}).outputs.hidden_states) > 1


@pytest.fixture
def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=384, num_key_value_heads=1, num_local_experts=4, **sizes)
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    return MixtralForCausalLM(config).eval()


def test_auxiliary_loss_of_experts(experts, rows):
    batch = stacked(rows)
    ours, theirs = causal_lm_loss(experts, batch).mean, experts(**batch).loss
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert theirs - torch.tensor(384).log() > 0.3  # it is in there
    gradients = [torch.autograd.grad(loss, list(experts.parameters())) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_auxiliary_loss_without_a_weight(rows):
    class Routed(Own):
        def forward(self, input_ids):
            return MoeCausalLMOutputWithPast(logits=super().forward(input_ids), aux_loss=torch.ones(()))

    with pytest.raises(LoraConfigError, match="Routed returns an aux_loss but has no router_aux_loss_coef"):
        causal_lm_loss(Routed(False), stacked(rows))


def test_says_what_is_wrong(module, rows):
    batch = stacked(rows)
    with pytest.raises(LoraConfigError, match=r"needs the batch's labels.* it has input_ids, attention_mask"):
        causal_lm_loss(module.model, {key: batch[key] for key in ("input_ids", "attention_mask")})
    with pytest.raises(LoraConfigError, match=r"Own takes input_ids, and the batch has none of that: tokens, labels"):
        causal_lm_loss(Own(True), {"tokens": batch["input_ids"], "labels": batch["labels"]})
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(LoraConfigError, match=r"encoder-decoder.*model\(\*\*batch\)\.loss"):
        causal_lm_loss(t5, batch)


@pytest.fixture(scope="module")
def shared_model():
    return CausalLM("demo:tiny-llama").model


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_labels(shared_model, data):
    """Whatever is labelled, sums of rows are the sum of the batch, and that is transformers' own."""
    height, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 8))
    flags = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    ids = torch.arange(height * width).reshape(height, width) + 3
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(torch.tensor(flags).reshape(height, width), ids, -100),
    }
    with torch.no_grad():
        loss = causal_lm_loss(shared_model, batch)
        single = [causal_lm_loss(shared_model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(height)]
        torch.testing.assert_close(sum(each.total for each in single), loss.total, atol=1e-4, rtol=1e-5)
        assert sum(int(each.terms) for each in single) == loss.terms
        if loss.terms:
            torch.testing.assert_close(loss.mean, shared_model(**batch).loss, atol=1e-5, rtol=1e-6)
