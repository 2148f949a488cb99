import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from lora_lightning.tasks import CausalLM
from lora_lightning.tasks.loss import causal_lm_loss, token_losses


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_equals_hugging_face(module, rows):
    batch = stacked(rows)
    total, count, _ = causal_lm_loss(module.model, batch)
    torch.testing.assert_close(total / count, module.model(**batch).loss, atol=1e-6, rtol=0)


def test_equals_hugging_face_where_padding_is_the_end_token(module, rows):
    """The trained end-of-turn token and the padding behind it are the same token; only the first is a label."""
    batch = stacked(rows)
    end = module.tokenizer.eos_token_id
    batch["input_ids"][batch["attention_mask"] == 0] = end
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(8), last] = end
    batch["labels"][torch.arange(8), last] = end
    total, count, _ = causal_lm_loss(module.model, batch)
    torch.testing.assert_close(total / count, module.model(**batch).loss, atol=1e-6, rtol=0)
    assert count == (batch["labels"][:, 1:] != -100).sum()


def test_head_runs_only_where_a_row_has_a_label(module, rows):
    batch = stacked(rows[:2])  # labels at the last positions only
    losses, trained, logits = token_losses(module.model, batch)
    positions = (batch["labels"][:, 1:] != -100).any(0).sum()
    assert losses.shape == trained.shape == logits.shape[:2] == (2, positions)
    assert positions < batch["labels"].shape[1]


def test_same_gradients_as_full_logits(module, rows):
    batch = stacked(rows)
    total, count, _ = causal_lm_loss(module.model, batch)
    (total / count).backward()
    ours = {name: weight.grad.clone() for name, weight in module.model.named_parameters()}
    module.model.zero_grad()
    module.model(**batch).loss.backward()
    for name, weight in module.model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, atol=1e-6, rtol=1e-4)


class Bare(nn.Module):
    """A model that can neither leave out positions nor be told about caches."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return CausalLMOutput(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


def test_models_with_a_plain_forward(module, rows):
    batch = stacked(rows) | {"note": torch.zeros(8)}  # what a model does not take is kept from it
    total, count, logits = causal_lm_loss(Bare(module.model), batch)
    expected, expected_count, _ = causal_lm_loss(module.model, batch)
    torch.testing.assert_close(total, expected)
    assert count == expected_count
    assert logits.shape[1] == batch["labels"].shape[1]


def test_other_architecture_equals_hugging_face(rows):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=32)).eval()
    batch = stacked(rows)
    total, count, _ = causal_lm_loss(model, batch)
    torch.testing.assert_close(total / count, model(**batch).loss, atol=1e-6, rtol=0)


def test_no_label_at_all(module, rows):
    batch = stacked(rows)
    batch["labels"].fill_(-100)
    total, count, _ = causal_lm_loss(module.model, batch)
    assert total == 0
    assert count == 0
    total.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in module.model.parameters() if weight.grad is not None)


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
        total, count, _ = causal_lm_loss(shared_model, batch)
        single = [causal_lm_loss(shared_model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(height)]
        torch.testing.assert_close(sum(each.total for each in single), total, atol=1e-4, rtol=1e-5)
        assert sum(int(each.terms) for each in single) == count
        if count:
            torch.testing.assert_close(total / count, shared_model(**batch).loss, atol=1e-5, rtol=1e-6)
