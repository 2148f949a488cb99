"""Who has a seat in the packed model: jobs that leave and come, what they keep, and the files of those that sit."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, lora_parameters
from lora_lightning.optim import fuse
from lora_lightning.optim.fused import lay_alike
from lora_lightning.sweeps.packed.model import PackedModel, unseat
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.loss import causal_lm_loss
from tests.sweeps.packed.solo import MIXED, Twins, adapted, batch, compare, seated, tiny_llama


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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
    twins, packed = seated(MIXED[:3])
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
    twins, packed = seated(MIXED[:2])
    batches = {slot: batch(2, 5, slot) for slot in range(2)}
    for model in (twins.solo[1], twins.shells[1]):
        for p in lora_parameters(model).values():
            p.data = 2 * p.detach()
    compare(twins, packed, batches)
    parameter = next(iter(lora_parameters(twins.shells[0]).values()))
    before, parameter.data = parameter.data, torch.zeros_like(parameter)
    packed.losses(batches, train=False, drawing=twins.drawing)
    parameter.data = before  # as one who shows other values for a while does
    compare(twins, packed, batches)


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
    twins, packed = seated(MIXED[:2])
    other = adapted(shell_of(tiny_llama()), {"r": 2, "use_dora": True})
    with pytest.raises(LoraConfigError, match="only plain LoRA"):
        packed.seat([*twins.shells, other])
    compare(twins, packed, {slot: batch(2, 5, slot) for slot in range(2)})


def test_unseat_keeps_values_layout_and_gradients():
    twins, _ = seated(MIXED[:2])
    before = {name: (p.clone(), p.stride(), p) for name, p in lora_parameters(twins.shells[0]).items()}
    unseat(twins.shells[0])
    for name, p in lora_parameters(twins.shells[0]).items():
        value, stride, same = before[name]
        assert p is same
        assert p.stride() == stride
        assert torch.equal(p, value)
