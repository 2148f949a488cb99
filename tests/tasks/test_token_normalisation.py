"""Accumulated batches and several processes must train as one big batch does, whatever the numbers of labels."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lora_lightning.tasks import CausalLM

pytestmark = pytest.mark.usefixtures("warm_starts")

SGD = partial(torch.optim.SGD, lr=0.5)
ROOT = Path(__file__).parents[2]


def weights(module):
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=name)


def reference(rows, windows):
    """Plain PyTorch: one SGD step a window on transformers' full logits, by the mean over the window's labels."""
    model = CausalLM("demo:tiny-llama").model
    optimizer = SGD(model.parameters())
    for window in windows:
        batch = {key: torch.stack([rows[index][key] for index in window]) for key in rows[0]}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4), (4, 2), (1, 8)])
def test_accumulation_equals_one_batch(fit, rows, batch_size, accumulate):
    module = CausalLM("demo:tiny-llama", optimizer=SGD)
    fit(module, rows, batch_size, accumulate_grad_batches=accumulate)
    assert_same(weights(module), reference(rows, [range(8)]), 1e-5)


def test_the_usual_mean_of_means_would_differ(rows):
    """The test above can fail: with means of means, as Lightning would take them, weights end elsewhere."""
    model = CausalLM("demo:tiny-llama").model
    optimizer = SGD(model.parameters())
    for start in range(0, 8, 2):
        batch = {key: torch.stack([row[key] for row in rows[start : start + 2]]) for key in rows[0]}
        (model(**batch).loss / 4).backward()
    optimizer.step()
    expected = reference(rows, [range(8)])
    assert max((weight - expected[name]).abs().max() for name, weight in model.named_parameters()) > 1e-3


def test_last_window_may_be_short(fit, rows):
    module = CausalLM("demo:tiny-llama", optimizer=SGD)
    fit(module, rows, 1, accumulate_grad_batches=3)
    assert_same(weights(module), reference(rows, [range(3), range(3, 6), range(6, 8)]), 1e-5)


def test_clipping_sees_normalised_gradients(fit, rows):
    clipped, free = (CausalLM("demo:tiny-llama", optimizer=SGD) for _ in range(2))
    start = weights(free)
    fit(clipped, rows, 2, accumulate_grad_batches=4, gradient_clip_val=1e-2)
    fit(free, rows, 2, accumulate_grad_batches=4)
    moved = {key: (value - start[key]) for key, value in weights(clipped).items()}
    length = torch.sqrt(sum((change**2).sum() for change in moved.values()))
    torch.testing.assert_close(length, torch.tensor(0.5 * 1e-2), rtol=1e-3, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(weights(free).values(), weights(clipped).values(), strict=True))


def test_a_window_without_labels_changes_nothing(fit, rows):
    for row in rows:
        row["labels"].fill_(-100)
    module = CausalLM("demo:tiny-llama", optimizer=SGD)
    start = weights(module)
    trainer = fit(module, rows, 2, accumulate_grad_batches=2)
    assert_same(weights(module), start, 0)
    assert trainer.callback_metrics["train_loss"] == 0


def test_an_interrupted_window_is_forgotten(fit, rows):
    module = CausalLM("demo:tiny-llama", optimizer=SGD)
    module._window = torch.tensor([1e3, 1e3, 1e3])
    fit(module, rows, 8)
    assert_same(weights(module), reference(rows, [range(8)]), 1e-5)


def test_loss_shown_is_the_mean(fit, rows):
    module = CausalLM("demo:tiny-llama", optimizer=SGD)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    expected = module.model(**batch).loss.detach()
    seen = []
    module.on_train_batch_end = lambda outputs, *_: seen.append(outputs["loss"])
    trainer = fit(module, rows, 2, accumulate_grad_batches=4)
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], expected, rtol=1e-5, atol=0)
    first = {key: value[:2] for key, value in batch.items()}
    hugging_face = CausalLM("demo:tiny-llama").model(**first).loss / 4  # Lightning shows it divided by the window
    torch.testing.assert_close(seen[0], hugging_face.detach(), rtol=1e-5, atol=0)


SCRIPT = """
import sys, torch
from functools import partial
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from lora_lightning.tasks import CausalLM

torch.set_num_threads(1)
rows = torch.load(sys.argv[1])
module = CausalLM("demo:tiny-llama", optimizer=partial(torch.optim.SGD, lr=0.5))
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, accumulate_grad_batches=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    num_sanity_val_steps=0, log_every_n_steps=1,
)

class Share(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(trainer.global_rank, len(rows), 2))
    def __len__(self):
        return len(rows) // 2

def loader(size):
    return DataLoader(rows, size, sampler=Share())

trainer.fit(module, loader(2), loader(3))
state = {name: weight.detach() for name, weight in module.model.named_parameters()}
metrics = {key: torch.as_tensor(value) for key, value in trainer.callback_metrics.items()}
result = {"state": state, "metrics": metrics, "tokens": module.tokens_seen}
torch.save(result, f"{sys.argv[2]}/{trainer.global_rank}.pt")
torch.distributed.destroy_process_group()  # no LoraCallback here, which would see to it
"""


def test_two_processes_equal_one_batch(rows, tmp_path):
    torch.save(rows, tmp_path / "rows.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", "rows.pt", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first["state"], second["state"], 0)
    expected = reference(rows, [range(8)])
    assert_same(first["state"], expected, 1e-5)

    before, after = CausalLM("demo:tiny-llama"), CausalLM("demo:tiny-llama")
    after.model.load_state_dict(expected, strict=False)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        torch.testing.assert_close(first["metrics"]["train_loss"], before.model(**batch).loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(first["metrics"]["val_loss"], after.model(**batch).loss, rtol=1e-5, atol=0)
    assert first["tokens"] + second["tokens"] == int(batch["attention_mask"].sum())
