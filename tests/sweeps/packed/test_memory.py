"""The estimate of memory against what processes take, against shapes, and against limits."""

from __future__ import annotations

import gc
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import MB, peak_of, saved_bytes, tensors_of
from lora_lightning.config import LoraConfig
from lora_lightning.data.loaders import Rows
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import inject_lora
from lora_lightning.strategies.allocator import keep_freed_memory
from lora_lightning.sweeps.packed import memory
from lora_lightning.sweeps.packed.counting import step_bytes
from lora_lightning.sweeps.packed.memory import Needs, longest_row, needs, places, told
from lora_lightning.sweeps.packed.model import PackedModel
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.sweeps.packed.task import _HandedOut
from lora_lightning.tasks.loss import causal_lm_loss

ROOT = Path(__file__).parents[3]


def model(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train().requires_grad_(False)


def batch(rows: int, tokens: int, scored: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * tokens).view(rows, tokens) % 97 + 1
    labels = ids.clone()
    labels[:, : tokens - scored] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora(r: int, dropout: float = 0.05) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout)


class Sweep:
    """Packed training in a process of its own, as the conductor does it."""

    def __init__(self, shape: tuple[int, int, int], ranks: tuple[int, ...]) -> None:
        keep_freed_memory()  # the callback does
        torch.set_num_threads(1)
        self.base = model(*shape)
        self.ranks = ranks

    def steps(self, given: dict[str, torch.Tensor], jobs: int, steps: int) -> None:
        packed = PackedModel(self.base)
        shells = [shell_of(self.base) for _ in range(jobs)]
        for shell, r in zip(shells, self.ranks, strict=False):
            inject_lora(shell, lora(r), seed=0)
        trained = [[p for p in shell.parameters() if p.requires_grad] for shell in shells]
        optimizers = [torch.optim.AdamW(each, fused=True) for each in trained]
        packed.seat(shells)
        for _ in range(steps):
            losses = packed.losses(dict.fromkeys(range(jobs), given), train=True, drawing=lambda slot: nullcontext())
            for slot, optimizer in enumerate(optimizers):
                total, _, gradients = losses.pop(slot)
                optimizer.zero_grad()
                handed = _HandedOut.apply(total, [g for _, g in gradients], *(p for p, _ in gradients))
                del gradients
                handed.backward()
                optimizer.step()

    def peak(self, rows: int, tokens: int, scored: int) -> int:
        self.steps(batch(1, 8, 4), 1, 1)  # libraries and what they make once are there
        gc.collect()
        found = peak_of(lambda: self.steps(batch(rows, tokens, scored), len(self.ranks), 2))
        return found["peak"] - found["before"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("shape", "ranks", "rows", "tokens", "scored"),
    [
        ((512, 8, 8192), (8, 16, 32, 64, 32, 16), 1, 48, 12),  # adapters
        ((256, 8, 2048), (8, 8, 8, 8), 4, 256, 32),  # activations
        ((256, 2, 49152), (8, 8, 8, 8), 4, 96, 96),  # logits
    ],
    ids=["adapters", "activations", "logits"],
)
def test_estimate_is_near_what_a_process_takes(warm_python, shape, ranks, rows, tokens, scored):
    found = needs(shell_of(model(*shape)), [lora(r) for r in ranks], batch(1, tokens, scored), rows=rows)
    estimate = found.of(len(ranks)) - len(ranks) * memory.OF_A_JOB  # no Trainer here
    code = f"from {__name__} import Sweep; print(Sweep({shape}, {ranks}).peak{rows, tokens, scored})"
    done = subprocess.run(
        [warm_python, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout)
    assert measured > 80 * MB, "too small to tell"
    assert estimate == pytest.approx(measured, rel=0.3), f"{estimate / MB:.0f} MB, measured {measured / MB:.0f}"


def test_what_is_kept_is_what_autograd_saves():
    base = model(64, 3, 500)
    shell = shell_of(base)
    inject_lora(shell, lora(8), seed=0)
    given = batch(3, 40, 20)
    counted = step_bytes(shell, given, "32-true")
    saved = saved_bytes(lambda: causal_lm_loss(shell, given).total, tensors_of(shell))
    # Alive are also inputs that nobody saves; not counted are the places that dropout draws with numpy.
    assert 0.9 * saved < counted.kept < 1.25 * saved
    assert 0 < counted.passing < counted.kept
    assert all(p.grad is None for p in shell.parameters())


def test_every_row_takes_as_much_as_any_other():
    shell = shell_of(model(64, 3, 500))
    inject_lora(shell, lora(8), seed=0)
    two, three, six = (step_bytes(shell, batch(n, 40, 1), "32-true").kept for n in (2, 3, 6))
    assert six - three == pytest.approx(3 * (three - two), rel=0.01)


def test_generators_and_base_are_left_alone():
    base = model(64, 2, 500)
    before = [p.clone() for p in base.parameters()]
    state = torch.get_rng_state()
    needs(shell_of(base), [lora(4)], batch(1, 20, 5), rows=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_adapters_are_counted_in_stacks_of_the_highest_rank():
    base = model(64, 2, 500)
    sides = sum(sum(p.shape) for name, p in base.named_parameters() if name.endswith("proj.weight"))
    found = needs(shell_of(base), [lora(4), lora(16)], batch(1, 20, 5), rows=1)
    assert found.adapters == (sides * 4 * (2 * 16 + 3 * 4), sides * 4 * (2 * 16 + 3 * 16))
    plain = needs(shell_of(base), [lora(4)], batch(1, 20, 5), rows=1, moments=0)
    assert plain.adapters == (sides * 4 * (2 * 4 + 4),)
    halves = needs(shell_of(base).to(torch.bfloat16), [lora(4)], batch(1, 20, 5), rows=1, precision="bf16-true")
    assert halves.adapters == (sides * 2 * (2 * 4 + 3 * 4),)
    assert halves.kept < 0.7 * found.kept


HUNDRED = Needs(
    base=0, adapters=(10, 30, 20), kept=100, passing=10, logits=50, logits_at_once=120, constant=5
)  # fmt: skip


def test_bytes_of_several_jobs(monkeypatch):
    monkeypatch.setattr(memory, "OF_A_JOB", 0)
    assert HUNDRED.of(1) == 30 + 5 + 100 + 50
    assert HUNDRED.of(2) == 50 + 5 + 200 + 100
    assert HUNDRED.of(3) == 60 + 5 + 300 + 75  # of 150 at most 120 are made at once: two halves


def test_places_are_as_many_as_fit_and_at_least_one(monkeypatch):
    monkeypatch.setattr(memory, "OF_A_JOB", 0)
    assert places(HUNDRED, 0) == 1
    assert places(HUNDRED, 395) == 2  # a tenth is left free
    assert places(HUNDRED, 394) == 1
    assert places(HUNDRED, 10**6) == 3
    assert places(HUNDRED, 0, wanted=2) == 2
    assert places(HUNDRED, 10**6, wanted=9) == 3


def test_the_line_says_who_waits():
    line = told(HUNDRED, 2, 2**30)
    assert "2 jobs" in line
    assert "1.00 GB free: 1 of 3 wait for a place" in line
    assert "all at once" in told(HUNDRED, 3, 2**30)


def test_longest_row_is_the_datas_own():
    ids = [torch.ones(tokens, dtype=torch.int32) for tokens in (3, 5, 2)]
    rows = Rows([{"input_ids": each, "labels": torch.cat([torch.tensor([-100]), each[1:]])} for each in ids])
    row = longest_row(SimpleNamespace(loaded=SimpleNamespace(train=rows)))
    assert row["input_ids"].tolist() == [[1, 1, 1, 1, 1]]
    assert row["labels"].tolist() == [[-100, 1, 1, 1, 1]]
    assert longest_row(object(), 70)["labels"].shape == (1, 70)
    assert longest_row(object())["labels"].shape == (1, memory.ASSUMED_TOKENS)


def test_a_job_whose_layers_are_not_there_takes_none_and_fails_by_itself_later():
    base, wrong = model(64, 1, 500), LoraConfig(r=64, target_modules=["q_prj"])
    found = needs(shell_of(base), [lora(8), wrong, lora(4)], batch(1, 8, 4), rows=1)
    without = needs(shell_of(base), [lora(8), lora(4)], batch(1, 8, 4), rows=1)
    assert found.of_adapters(3) == without.of_adapters(2)
    with pytest.raises(LoraConfigError, match="q_prj"):
        needs(shell_of(base), [wrong], batch(1, 8, 4), rows=1)
