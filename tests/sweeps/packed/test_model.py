"""Jobs on one packed model against each of them alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, lora_disabled, lora_parameters
from lora_lightning.optim import fuse
from lora_lightning.optim.fused import lay_alike
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.loss import causal_lm_loss
from tests.sweeps.packed.solo import ALL, MIXED, SIDES, batch, compare, seated, tiny_llama


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("count", range(1, len(MIXED) + 1))
def test_losses_and_gradients_are_those_of_each_job_alone(count):
    twins, packed = seated(MIXED[-count:])
    for step in range(2):
        compare(twins, packed, {slot: batch(2, 4 + 3 * slot - step, seed=slot + step) for slot in range(count)})


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
jobs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_dropout": st.sampled_from([0.0, 0.1, 0.4]),
        "target_modules": st.just(ALL) | st.sets(st.sampled_from(MODULES), min_size=1).map(sorted),
    }
)


@settings(max_examples=15, deadline=None)
@given(configs=st.lists(jobs, min_size=1, max_size=3), rows=st.integers(1, 3), masked=st.booleans(), data=st.data())
def test_any_layers_ranks_and_widths(configs, rows, masked, data):
    twins, packed = seated(configs)
    widths = [data.draw(st.integers(2, 8)) for _ in configs]
    compare(twins, packed, {slot: batch(rows, width, slot, masked) for slot, width in enumerate(widths)})


def _train(twins, packed, steps, rates, tolerance, dtype):
    makes = [lambda p, lr=lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01) for lr in rates]
    alone = [fuse(make(list(lora_parameters(m).values())), m) for make, m in zip(makes, twins.solo, strict=True)]
    together = [fuse(make(list(lora_parameters(m).values())), m) for make, m in zip(makes, twins.shells, strict=True)]
    for step in range(steps):
        batches = {slot: batch(2, 5 + (step + slot) % 3, seed=31 * step + slot) for slot in range(3)}
        found = packed.losses(batches, train=True, drawing=twins.drawing)
        for slot, loss in found.items():
            total, terms, _ = twins.alone(slot, batches[slot])
            torch.testing.assert_close(loss.total / terms, total / terms, rtol=tolerance, atol=tolerance)
            for parameter, gradient in loss.gradients:
                parameter.grad = gradient
            for optimizer in (alone[slot], together[slot]):
                lay_alike(optimizer)
                optimizer.step()
    for one, other in zip(twins.solo, twins.shells, strict=True):
        for name, p in lora_parameters(one).items():
            assert p.dtype == dtype
            torch.testing.assert_close(lora_parameters(other)[name], p, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "rates"),
    [(torch.float64, 1e-10, (1e-2, 3e-3, 1e-3)), (torch.float32, 1e-4, (1e-3, 3e-4, 1e-4))],
)
def test_fifty_steps(dtype, tolerance, rates):
    twins, packed = seated(MIXED[:3], tiny_llama(dtype))
    _train(twins, packed, 50, rates, tolerance, dtype)


def test_a_model_that_scales_and_caps_its_logits_draws_once():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **SIDES,
        head_dim=8,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    base = Gemma2ForCausalLM(config).double().train()
    # What the first forward shows of a head is known beforehand to a job alone here, or it would run twice there too.
    twins, packed = seated(MIXED[:2], base)
    compare(twins, packed, {slot: batch(1, 6, slot) for slot in range(2)}, tolerance=1e-6)


@pytest.mark.parametrize("slots", [(0, 1, 2), (1,), (0, 2), (1, 2)])
def test_evaluation_of_some(slots):
    twins, packed = seated(MIXED[:3])
    batches = {slot: batch(2, 5 + slot, slot) for slot in slots}
    found = packed.losses(batches, train=False, drawing=lambda slot: pytest.fail("evaluation draws nothing"))
    assert found.keys() == set(slots)
    for slot, loss in found.items():
        total, terms, _ = twins.alone(slot, batches[slot], train=False)
        torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=1e-10)
        assert int(loss.terms) == int(terms)
        assert loss.gradients == []


def test_a_batch_without_a_label():
    twins, packed = seated(MIXED[:2])
    batches = {slot: batch(1, 5, slot) for slot in range(2)}
    batches[1]["labels"][:] = -100
    compare(twins, packed, batches)


def test_a_job_that_diverges_leaves_the_bits_of_the_others():
    twins, packed = seated(MIXED[:3])
    batches = {slot: batch(2, 6, slot) for slot in range(3)}
    states = list(twins.packed_states)
    before = packed.losses(batches, train=True, drawing=twins.drawing)
    next(iter(lora_parameters(twins.shells[1]).values())).data[0, 0] = float("nan")
    twins.packed_states = states
    after = packed.losses(batches, train=True, drawing=twins.drawing)
    assert after[1].total.isnan()
    for slot in (0, 2):
        assert torch.equal(before[slot].total, after[slot].total)
        for (_, one), (_, other) in zip(before[slot].gradients, after[slot].gradients, strict=True):
            assert torch.equal(one, other)


def test_the_base_and_other_shells_are_not_changed(tokens):
    base = tiny_llama()
    before = base(tokens).logits
    twins, packed = seated(MIXED[:2], base)
    packed.losses({slot: batch(2, 5, slot) for slot in range(2)}, train=True, drawing=twins.drawing)
    assert torch.equal(base(tokens).logits, before)
    assert all(p.grad is None for p in base.parameters())
    assert all(p.requires_grad for p in base.parameters())
    for solo, shell in zip(twins.solo, twins.shells, strict=True):
        torch.testing.assert_close(shell.eval()(tokens).logits, solo.eval()(tokens).logits)


def _saved(run):
    """Bytes that a graph keeps, each memory once, without those of parameters."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        known = run()
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for pointer, (size, _) in kept.items() if pointer not in known)


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
def test_memory_for_backward_is_that_of_the_jobs_alone(dropout):
    config = {"r": 4, "lora_dropout": dropout}
    twins, packed = seated([config] * 3, tiny_llama(torch.float32))
    batches = {slot: batch(2, 16, 1, masked=False) for slot in range(3)}

    def alone():
        causal_lm_loss(twins.solo[0].train(), batches[0]).total.backward()
        return list(twins.solo[0].parameters())

    def together():
        packed.losses(batches, train=True, drawing=twins.drawing)
        stacks = [tensor for stack in packed._stacks for tensor in (stack.a, *stack.bs)]
        return [*packed.model.parameters(), *stacks]

    alone(), together()
    # Beside that of the jobs there is the loss: a number a label.
    assert _saved(together) <= 3 * _saved(alone) * 1.02


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda b: b.update(batch(3, 5)), "batches of one size, got 2, 3 rows"),
        (lambda b: b.pop("attention_mask"), "all or none"),
        (lambda b: b.pop("labels"), "input_ids, labels"),
        (lambda b: b.update(position_ids=b["input_ids"]), "What position_ids would mean"),
    ],
)
def test_batches_that_do_not_go_together_are_refused(change, told):
    twins, packed = seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    change(batches[1])
    with pytest.raises(LoraConfigError, match=told):
        packed.losses(batches, train=True, drawing=twins.drawing)


def test_some_train_while_others_pause():
    twins, packed = seated(MIXED[:3])
    for slots in ((0, 2), (1,), (1, 2)):
        compare(twins, packed, {slot: batch(2, 5 + slot, slot) for slot in slots})


def test_slots_that_are_not_there_are_refused():
    twins, packed = seated(MIXED[:2])
    for batches, told in (({2: batch(2, 5)}, "0 to 1, got 2"), ({}, "got none")):
        with pytest.raises(LoraConfigError, match=told):
            packed.losses(batches, train=False, drawing=twins.drawing)
    packed.seat([])
    with pytest.raises(LoraConfigError, match="no model has been seated"):
        packed.losses({0: batch(2, 5)}, train=False, drawing=twins.drawing)


def test_an_adapter_that_is_switched_off_is_refused():
    twins, packed = seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    with lora_disabled(twins.shells[1]), pytest.raises(LoraConfigError, match=r"job 1 .*switched off"):
        packed.losses(batches, train=False, drawing=twins.drawing)


def test_only_what_trains_gets_a_gradient():
    twins, packed = seated(MIXED[:2])
    for model in (twins.solo[0], twins.shells[0]):
        for name, p in lora_parameters(model).items():
            p.requires_grad_(not name.endswith("lora_A"))
    packed.seat(twins.shells)
    compare(twins, packed, {slot: batch(2, 5, slot) for slot in range(2)})


def test_other_models_than_llama():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SIDES,
        head_dim=8,
        tie_word_embeddings=True,
    )
    base = Qwen3ForCausalLM(config).double().train()
    twins, packed = seated(MIXED[:3], base)
    compare(twins, packed, {slot: batch(2, 5 + slot, slot) for slot in range(3)}, tolerance=1e-6)


def test_a_mixture_of_experts_that_picks_tokens_is_refused_when_it_runs(monkeypatch):
    base = tiny_llama()
    twins, packed = seated([{"r": 2}], base)
    mlp = packed.model.model.layers[0].mlp
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: original(x[:, :2]))
    with pytest.raises(LoraConfigError, match="which row is whose"):
        packed.losses({0: batch(2, 5)}, train=True, drawing=twins.drawing)


def test_injecting_is_not_disturbed_by_shells_before():
    base = tiny_llama()
    reports = [inject_lora(shell_of(base), LoraConfig(r=2), seed=0) for _ in range(2)]
    assert str(reports[0]) == str(reports[1])
