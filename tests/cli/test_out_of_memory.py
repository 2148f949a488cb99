"""A training that runs out of memory, and what it ends with."""

from __future__ import annotations

import errno
import json
import sys

import pytest
import torch

from lora_lightning.cli.out_of_memory import is_out_of_memory, remedied
from lora_lightning.cli.told import CommandError
from lora_lightning.cli.train import main

SHORT = ("callbacks=minimal", "optimized_metric=null", "trainer.max_steps=1", "trainer.limit_val_batches=0")

STARVED = """
import resource, sys
import torch
from hydra import compose, initialize_config_module
import lora_lightning.cli.planning, lora_lightning.reports.plan.remedy
from lora_lightning.cli.out_of_memory import remedied
from lora_lightning.cli.told import told

overrides = ["experiment=smoke", "data.batch_size=8", "data.max_length=64", "paths.output_dir=x"]
with initialize_config_module("lora_lightning.conf", version_base="1.3"):
    cfg = compose("train", overrides=overrides)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
with told(), remedied(cfg, overrides[:2]):
    torch.ones(2**28)
"""


def pasted_from(stderr):
    return stderr[stderr.index("The corrected command:") :].splitlines()[1].split()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_training_that_runs_out_of_memory_ends_with_a_command_to_paste(command, warm_python):
    done = command("-c", STARVED, python=warm_python)
    assert done.returncode == 1, done.stderr
    assert "The memory did not suffice (RuntimeError:" in done.stderr
    assert "you tried to allocate 1073741824 bytes" in done.stderr
    pasted = pasted_from(done.stderr)
    words = dict(word.split("=") for word in pasted if "=" in word)
    assert words["experiment"] == "smoke"
    assert int(words["data.batch_size"]) * int(words["trainer.accumulate_grad_batches"]) == 8
    assert "data.batch_size=8" not in pasted
    assert "Traceback" not in done.stderr


def test_every_line_that_is_told_is_one_that_train_takes(call, tmp_path, monkeypatch):
    (tmp_path / "starving.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Starve(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        if len(batch['input_ids']) == 12:\n"
        "            raise RuntimeError('CUDA error: out of memory')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    texts = [f"{number} a fox met the dog at the river" * (12 if number % 15 == 5 else 1) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.batch_size=12", "data.max_length=256"]
    settings = ["experiment=smoke", *SHORT, *data, "lora=conservative"]
    starving, place = "+callbacks.starve._target_=starving.Starve", f"hydra.run.dir={tmp_path / 'run'}"
    done = call(main, *settings, starving, place)
    assert done.status == 1
    lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("  ") and "=" in line]
    told = {line: {word.split("=")[0] for word in line.split()} for line in lines}
    batch, again = {"data.batch_size", "trainer.accumulate_grad_batches"}, {"model.gradient_checkpointing"}
    kinds = [batch, batch | {"data.packing"}, again, batch | again, batch | again | {"data.max_length"}]
    assert all(kind in told.values() for kind in kinds)
    pasted = pasted_from(done.stderr)
    assert {"experiment=smoke", starving, *lines[0].split()} <= set(pasted)
    assert not {"data.batch_size=12", place} & set(pasted)  # what lies in that folder is not written over
    for number, line in enumerate(lines):
        kept = [word for word in settings if word.partition("=")[0] not in told[line]]
        words = [*kept, *line.split()] if number else pasted[2:]
        taken = call(main, *words, f"hydra.run.dir={tmp_path / str(number)}")
        assert taken.status == 0, taken.stderr
        assert json.loads((tmp_path / str(number) / "result.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error in: … Last error: Cuda failure 2 'out of memory'"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_for_want_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_another_process_than_the_first_tells_it_in_a_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(CommandError, match=r"did not suffice .*\. What takes less: data.batch_size=1 "),
        remedied({}, []),
    ):
        raise MemoryError


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_same_in_a_real_training(command, tmp_path):
    text = " ".join(["the minister has won the second game and a small team will open a better market"] * 30)
    rows = [{"prompt": f"story {number}", "completion": text} for number in range(300)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = tmp_path / "train.py"
    program.write_text(
        "import resource\nimport lora_lightning.cli.training, lora_lightning.cli.planning\n"
        "from lora_lightning.cli.train import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)\nmain()\n"
    )
    settings = ["experiment=own", "model=tiny_llama", f"data.path={tmp_path / 'long.jsonl'}", "data.batch_size=256"]
    short = ["trainer.limit_val_batches=0", "trainer.num_sanity_val_steps=0", "callbacks=minimal"]
    done = command(program, *settings, *short, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "trainer.accumulate_grad_batches=" in done.stderr
    assert "data.max_length" not in done.stderr.partition("The corrected command:")[0]  # all rows are as long as can be
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
