"""DeepSpeed's ZeRO, for real, in two processes on the CPU; skipped where DeepSpeed is not installed.

The strategy is Lightning's, without its questions after CUDA; engine, optimizer and exchange are DeepSpeed's own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning.adapters.checkpoint import read_checkpoint

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install lora-lightning[deepspeed]")
pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("deepspeed_worker.py")
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a fit once for each set of arguments; gives its folder and the notes of its first process."""
    done = {}

    def once(*arguments, late=False):
        key = (late, *map(str, arguments))
        if key not in done:
            out = tmp_path_factory.mktemp("run")
            env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **({"LATE": "1"} if late else {})}
            command = [sys.executable, WORKER, out, *key[1:]]
            ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
            assert ended.returncode == 0, ended.stderr[-3000:]
            done[key] = out, json.loads((out / "notes0.json").read_text()), ended.stderr
        return done[key]

    return once


def _tensors(path):
    """Every tensor of a checkpoint, the optimizer's included, by name."""
    checkpoint = read_checkpoint(path)
    found = dict(checkpoint["state_dict"])
    for name, values in checkpoint["optimizer_states"][0]["state"].items():
        found.update({f"{name}:{key}": value for key, value in values.items()})
    return found


def _difference(one, other, epoch=2):
    a, b = (_tensors(out / "ckpt" / f"epoch={epoch}.ckpt") for out in (one, other))
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_one_process_does_and_resumes_as_if_never_interrupted(run, stage):
    whole, told, _ = run("--devices", 1)
    out, notes, _ = run("--stage", stage)
    assert "error" not in notes
    assert notes["val_loss"] == pytest.approx(told["val_loss"], abs=1e-6)
    assert _difference(out, whole) < 1e-6
    resumed, notes, _ = run("--stage", stage, "--ckpt", out / "ckpt" / "epoch=0.ckpt")
    assert "error" not in notes
    assert _difference(out, resumed) == 0
    assert _difference(out, resumed, epoch=1) == 0
    begun = [torch.load(resumed / f"start{rank}.pt", weights_only=True)["start"] for rank in (0, 1)]
    assert all("lora_" in name for name in begun[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_adapters_only(run, stage):
    folder = run("--stage", stage)[0] / "ckpt" / "epoch=0.ckpt"
    assert all("lora_" in name for name in read_checkpoint(folder)["state_dict"])
    engine = list((folder / "checkpoint").glob("*model_states.pt"))
    assert engine
    for path in engine:
        content = torch.load(path, weights_only=True)  # no code in it
        assert all("lora_" in name for name in content["module"])
        assert "state_dict" not in content
        assert not content["frozen_param_shapes"]


@pytest.mark.parametrize(
    ("before", "after"), [("--stage 1", "--stage 3"), ("--stage 3", "--devices 1"), ("--devices 1", "--stage 2")]
)
def test_a_strategy_goes_on_from_anothers_checkpoint(run, before, after):
    first = run(*before.split())[0]
    out, notes, _ = run(*after.split(), "--ckpt", first / "ckpt" / "epoch=0.ckpt")
    assert "error" not in notes
    assert _difference(first, out) < 1e-6


def test_a_network_built_partitioned(run):
    out, notes, _ = run("--stage", 3, late=True)
    assert notes["partitioned"]  # its weights were empty when the adapters were added
    assert _difference(out, run("--devices", 1)[0]) < 1e-6


def test_what_trains_in_full_in_a_network_built_partitioned(run):
    alone, told, _ = run("--devices", 1, "--in-full")
    out, notes, _ = run("--stage", 3, "--in-full", late=True)
    assert "error" not in notes
    assert notes["originals"] == pytest.approx(told["originals"])
    assert _difference(out, alone) < 1e-6


@pytest.mark.parametrize("stage", [1, 3])
def test_validation_reads_a_checkpoint(run, stage):
    out, told, _ = run("--stage", stage)
    notes = run("--stage", stage, "--validate", "--ckpt", out / "ckpt" / "epoch=2.ckpt")[1]
    assert notes["val_loss"] == pytest.approx(told["val_loss"], abs=1e-6)


def test_groups_with_masters_in_float32_resume(run):
    arguments = ("--stage", 2, "--groups", "--precision", "bf16-mixed")
    out, notes, _ = run(*arguments)
    assert "error" not in notes
    assert all(value.dtype == torch.float32 for value in _tensors(out / "ckpt" / "epoch=0.ckpt").values())
    assert _difference(out, run(*arguments, "--ckpt", out / "ckpt" / "epoch=0.ckpt")[0]) == 0
    # A group in which nothing trains is there in one process, and not under DeepSpeed.
    alone = run("--devices", 1, "--groups")[0]
    assert _difference(alone, run("--stage", 3, "--groups", "--ckpt", alone / "ckpt" / "epoch=0.ckpt")[0]) < 1e-6


def test_accumulated_gradients_are_divided_once(run):
    assert _difference(run("--stage", 2, "--accumulate", 5)[0], run("--devices", 1, "--accumulate", 5)[0]) < 1e-6


def test_batches_left_over_in_a_checkpoint_are_told(run):
    log = run("--stage", 2, "--accumulate", 2, "--epochs", 1)[2]
    assert "is without the gradients of 1 accumulated batches" in log


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_are_not_finite_on_one_process_stop_all(run, stage):
    out, notes, _ = run("--stage", stage, "--bad-batch", 2)
    assert notes["error"].startswith("NonFiniteError: step 2")
    assert "6 trained tensors" in notes["error"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_step_is_skipped(run):
    out, _, log = run("--stage", 3, "--bad-batch", 2, "--nonfinite", "skip", "--epochs", 1)
    assert "the step is skipped" in log
    assert all(value.isfinite().all() for value in _tensors(out / "ckpt" / "epoch=0.ckpt").values())
