"""Jobs on one packed model against each of them alone."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, inject_lora, lora_disabled, lora_parameters
from lora_lightning.optim import fuse
from lora_lightning.optim.fused import lay_alike
from lora_lightning.sweeps.packed.model import PackedModel, unseat
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.loss import causal_lm_loss
from tests.sweeps.packed.solo import ALL, VOCABULARY, Twins, adapted, batch, by_name, tiny_llama

MIXED = [
    {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05},
    {"r": 8, "use_rslora": True, "lora_dropout": 0.3},
    {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    {"r": 3, "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"o_proj": 1}},
    {"r": 1, "target_modules": ["gate_proj", "k_proj"], "lora_dropout": 0.5},
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _seated(configs, base=None):
    base = tiny_llama() if base is None else base
    twins, packed = Twins(base, configs), PackedModel(base)
    packed.seat(twins.shells)
    return twins, packed


def _compare(twins, packed, batches, tolerance=1e-10):
    found = packed.losses(batches, train=True, drawing=twins.drawing)
    assert found.keys() == batches.keys()
    for slot, loss in found.items():
        total, terms, grads = twins.alone(slot, batches[slot])
        torch.testing.assert_close(loss.total, total, rtol=tolerance, atol=tolerance)
        assert loss.terms.dtype == torch.int64
        assert int(loss.terms) == int(terms)
        mine = by_name(twins.shells[slot], loss.gradients)
        assert mine.keys() == grads.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(grad, grads[name], rtol=tolerance, atol=tolerance)
        assert torch.equal(twins.states[slot], twins.packed_states[slot])
        assert not loss.total.requires_grad


@pytest.mark.parametrize("count", range(1, len(MIXED) + 1))
def test_losses_and_gradients_are_those_of_each_job_alone(count):
    twins, packed = _seated(MIXED[-count:])
    for step in range(2):
        _compare(twins, packed, {slot: batch(2, 4 + 3 * slot - step, seed=slot + step) for slot in range(count)})


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
    twins, packed = _seated(configs)
    widths = [data.draw(st.integers(2, 8)) for _ in configs]
    _compare(twins, packed, {slot: batch(rows, width, slot, masked) for slot, width in enumerate(widths)})


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
    twins, packed = _seated(MIXED[:3], tiny_llama(dtype))
    _train(twins, packed, 50, rates, tolerance, dtype)


def test_a_model_that_scales_and_caps_its_logits_draws_once():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    base = Gemma2ForCausalLM(config).double().train()
    # What the first forward shows of a head is known beforehand to a job alone here, or it would run twice there too.
    twins, packed = _seated(MIXED[:2], base)
    _compare(twins, packed, {slot: batch(1, 6, slot) for slot in range(2)}, tolerance=1e-6)


@pytest.mark.parametrize("slots", [(0, 1, 2), (1,), (0, 2), (1, 2)])
def test_evaluation_of_some(slots):
    twins, packed = _seated(MIXED[:3])
    batches = {slot: batch(2, 5 + slot, slot) for slot in slots}
    found = packed.losses(batches, train=False, drawing=lambda slot: pytest.fail("evaluation draws nothing"))
    assert found.keys() == set(slots)
    for slot, loss in found.items():
        total, terms, _ = twins.alone(slot, batches[slot], train=False)
        torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=1e-10)
        assert int(loss.terms) == int(terms)
        assert loss.gradients == []


def test_a_batch_without_a_label():
    twins, packed = _seated(MIXED[:2])
    batches = {slot: batch(1, 5, slot) for slot in range(2)}
    batches[1]["labels"][:] = -100
    _compare(twins, packed, batches)


def test_a_job_that_diverges_leaves_the_bits_of_the_others():
    twins, packed = _seated(MIXED[:3])
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


def test_one_leaves_another_takes_its_place_and_optimizers_go_on():
    base = tiny_llama()
    twins = Twins(base, MIXED[:4])
    packed = PackedModel(base)
    optimizers = {}
    for slot in range(4):
        for kind, model in (("solo", twins.solo[slot]), ("shell", twins.shells[slot])):
            parameters = list(lora_parameters(model).values())
            optimizers[kind, slot] = fuse(torch.optim.AdamW(parameters, lr=1e-2), model)
    kept = {name: p for shell in twins.shells for name, p in lora_parameters(shell).items()}

    def step(members):
        packed.seat([twins.shells[slot] for slot in members])
        batches = {place: batch(2, 5 + place, 7 * place) for place in range(len(members))}
        states = twins.packed_states
        twins.packed_states = [states[slot] for slot in members]
        found = packed.losses(batches, train=True, drawing=twins.drawing)
        for place, slot in enumerate(members):
            states[slot] = twins.packed_states[place]
            total, _, _ = twins.alone(slot, batches[place])
            torch.testing.assert_close(found[place].total, total, rtol=1e-10, atol=1e-10)
            for parameter, gradient in found[place].gradients:
                parameter.grad = gradient
            for kind in ("solo", "shell"):
                lay_alike(optimizers[kind, slot])
                optimizers[kind, slot].step()
        twins.packed_states = states

    for members in ([0, 1, 2], [0, 1, 2], [0, 2], [3, 2, 0], [1, 0], [2]):
        step(members)
    assert kept == {name: p for shell in twins.shells for name, p in lora_parameters(shell).items()}
    for slot in range(4):
        for name, p in lora_parameters(twins.shells[slot]).items():
            torch.testing.assert_close(p, lora_parameters(twins.solo[slot])[name], rtol=1e-9, atol=1e-9)


def test_one_that_has_left_keeps_no_stack_alive():
    twins, packed = _seated(MIXED[:3])
    stacks = [weakref.ref(leaf.untyped_storage()) for stack in packed._stacks for leaf in stack.leaves]
    (first, *_), size = lora_parameters(twins.shells[0]).values(), lambda p: p.untyped_storage().nbytes()
    assert size(first) > first.numel() * first.element_size()
    packed.seat(twins.shells[1:])
    for p in lora_parameters(twins.shells[0]).values():
        assert size(p) == p.numel() * p.element_size()
    packed.seat([])
    gc.collect()
    assert stacks
    for shell in twins.shells:
        for p in lora_parameters(shell).values():
            assert size(p) == p.numel() * p.element_size()


def test_values_that_are_put_elsewhere_are_taken_in_again():
    twins, packed = _seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    for model in (twins.solo[1], twins.shells[1]):
        for p in lora_parameters(model).values():
            p.data = 2 * p.detach()
    _compare(twins, packed, batches)
    parameter = next(iter(lora_parameters(twins.shells[0]).values()))
    before, parameter.data = parameter.data, torch.zeros_like(parameter)
    packed.losses(batches, train=False, drawing=twins.drawing)
    parameter.data = before  # as one who shows other values for a while does
    _compare(twins, packed, batches)


def test_the_base_and_other_shells_are_not_changed(tokens):
    base = tiny_llama()
    before = base(tokens).logits
    twins, packed = _seated(MIXED[:2], base)
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
    twins, packed = _seated([config] * 3, tiny_llama(torch.float32))
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


class Job(LightningModule):
    """Trains in the first of two slots, or alone where there is no packed model."""

    def __init__(self, model, packed, twins):
        super().__init__()
        self.model, self._shared = model, (packed, twins)

    def training_step(self, few, number):
        packed, twins = self._shared
        if packed is None:
            return causal_lm_loss(self.model, few).mean
        if not packed._models:
            packed.seat([self.model, twins.shells[1]])
        loss = packed.losses({0: few, 1: few}, train=True, drawing=lambda slot: nullcontext())[0]
        return sum((p * gradient).sum() for p, gradient in loss.gradients) / loss.terms

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def _fit(folder, base, shared, steps, resume=None):
    model = shell_of(base)
    packed = twins = None
    if shared:
        twins, packed = Twins(base, [{"r": 4}, {"r": 6}]), PackedModel(base)
    job = Job(model, packed, twins)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoraCallback(LoraConfig(r=4)), ModelCheckpoint(folder, save_last=True, save_top_k=0)],
        default_root_dir=folder,
    )
    rows = [{key: value[0] for key, value in batch(1, 8, seed).items()} for seed in range(6)]
    trainer.fit(job, DataLoader(rows, 1), ckpt_path=resume)
    return {name: p.detach().clone() for name, p in lora_parameters(model).items()}


def test_files_of_a_seated_job_are_as_large_as_those_of_one_alone_and_either_goes_on_as_the_other(tmp_path):
    base = tiny_llama()
    seated, alone = tmp_path / "seated", tmp_path / "alone"
    _fit(seated, base, True, 3)
    _fit(alone, base, False, 3)
    names = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    assert names == {path.relative_to(seated) for path in seated.rglob("*") if path.is_file()}
    assert {"last.ckpt", "adapter_model.safetensors"} <= {name.name for name in names}
    for name in names:
        assert (seated / name).stat().st_size <= (alone / name).stat().st_size * 1.02, name
    expected = _fit(tmp_path / "whole", base, False, 6)
    for number, (start, shared) in enumerate([(seated, True), (seated, False), (alone, True)]):
        values = _fit(tmp_path / str(number), base, shared, 6, start / "last.ckpt")
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_a_copy_of_the_base_is_refused():
    base = tiny_llama()
    stranger = adapted(copy.deepcopy(base), {"r": 2})
    with pytest.raises(LoraConfigError, match=r"job 1 .*self_attn\.q_proj is not of the base model in memory"):
        PackedModel(base).seat([adapted(shell_of(base), {"r": 2}), stranger])


def test_who_cannot_be_seated_leaves_the_seats_as_they_were():
    twins, packed = _seated(MIXED[:2])
    other = adapted(shell_of(tiny_llama()), {"r": 2, "use_dora": True})
    with pytest.raises(LoraConfigError, match="only plain LoRA"):
        packed.seat([*twins.shells, other])
    _compare(twins, packed, {slot: batch(2, 5, slot) for slot in range(2)})


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
    twins, packed = _seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    change(batches[1])
    with pytest.raises(LoraConfigError, match=told):
        packed.losses(batches, train=True, drawing=twins.drawing)


def test_some_train_while_others_pause():
    twins, packed = _seated(MIXED[:3])
    for slots in ((0, 2), (1,), (1, 2)):
        _compare(twins, packed, {slot: batch(2, 5 + slot, slot) for slot in slots})


def test_slots_that_are_not_there_are_refused():
    twins, packed = _seated(MIXED[:2])
    for batches, told in (({2: batch(2, 5)}, "0 to 1, got 2"), ({}, "got none")):
        with pytest.raises(LoraConfigError, match=told):
            packed.losses(batches, train=False, drawing=twins.drawing)
    packed.seat([])
    with pytest.raises(LoraConfigError, match="no model has been seated"):
        packed.losses({0: batch(2, 5)}, train=False, drawing=twins.drawing)


def test_an_adapter_that_is_switched_off_is_refused():
    twins, packed = _seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    with lora_disabled(twins.shells[1]), pytest.raises(LoraConfigError, match=r"job 1 .*switched off"):
        packed.losses(batches, train=False, drawing=twins.drawing)


def test_only_what_trains_gets_a_gradient():
    twins, packed = _seated(MIXED[:2])
    for model in (twins.solo[0], twins.shells[0]):
        for name, p in lora_parameters(model).items():
            p.requires_grad_(not name.endswith("lora_A"))
    packed.seat(twins.shells)
    _compare(twins, packed, {slot: batch(2, 5, slot) for slot in range(2)})


def test_unseat_keeps_values_layout_and_gradients():
    twins, _ = _seated(MIXED[:2])
    before = {name: (p.clone(), p.stride(), p) for name, p in lora_parameters(twins.shells[0]).items()}
    unseat(twins.shells[0])
    for name, p in lora_parameters(twins.shells[0]).items():
        value, stride, same = before[name]
        assert p is same
        assert p.stride() == stride
        assert torch.equal(p, value)


def test_other_models_than_llama():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    base = Qwen3ForCausalLM(config).double().train()
    twins, packed = _seated(MIXED[:3], base)
    _compare(twins, packed, {slot: batch(2, 5 + slot, slot) for slot in range(3)}, tolerance=1e-6)


def test_a_mixture_of_experts_that_picks_tokens_is_refused_when_it_runs(monkeypatch):
    base = tiny_llama()
    twins, packed = _seated([{"r": 2}], base)
    mlp = packed.model.model.layers[0].mlp
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: original(x[:, :2]))
    with pytest.raises(LoraConfigError, match="which row is whose"):
        packed.losses({0: batch(2, 5)}, train=True, drawing=twins.drawing)


def test_injecting_is_not_disturbed_by_shells_before():
    base = tiny_llama()
    reports = [inject_lora(shell_of(base), LoraConfig(r=2), seed=0) for _ in range(2)]
    assert str(reports[0]) == str(reports[1])
