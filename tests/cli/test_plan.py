from __future__ import annotations

import json
import sys

import pytest

from lora_lightning.cli.plan import main

SMOKE = ("experiment=smoke", "plan.calibration=false")


def test_a_plan_of_the_training_that_train_would_do(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(main, *SMOKE, "plan.json=true", "lora.r=8", "data.batch_size=2", "data.max_length=64")
    assert done.status == 0, done.stderr
    content = json.loads(done.stdout[done.stdout.index("{") :])
    assert content["setting"]["rows"] == 2
    assert content["setting"]["tokens"] == 64
    assert {kind["r"] for kind in content["adapted"]} == {8}
    assert content["trainable_parameters"] == sum(kind["parameters"] for kind in content["adapted"])
    assert list(tmp_path.iterdir()) == []  # no folder of a run


def test_side_by_side(call):
    done = call(main, *SMOKE, "--compare", "lora=conservative,balanced")
    assert done.status == 0, done.stderr
    for words in ("lora=conservative", "lora=balanced", "q_proj, v_proj", "adapter file", "memory of a device"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "lora=balanced"], "one setting with several values"),
        (["--compare", "lora=balanced,conservativ"], "did you mean conservative"),
        (["-m", "lora.r=1,2"], "--compare"),
        (["plan.memory=much", "model.dtype=flaot32"], "did you mean float32"),
        (["model=hub", "model.name=shape:llama"], "There are smollm2-135m"),
        (["task=sequence_classification", "trainer.accelerator=tpu"], "cpu and gpu"),
    ],
)
def test_mistakes_are_told(call, words, message):
    done = call(main, *SMOKE, *words)
    assert done.status == 1
    assert message in done.stderr


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


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_training_that_runs_out_of_memory_ends_with_a_command_to_paste(command):
    done = command("-c", STARVED)
    assert done.returncode == 1, done.stderr
    assert "The memory did not suffice (RuntimeError:" in done.stderr
    assert "you tried to allocate 1073741824 bytes" in done.stderr
    pasted = done.stderr[done.stderr.index("The corrected command:") :].splitlines()[1]
    words = dict(word.split("=") for word in pasted.split() if "=" in word)
    assert words["experiment"] == "smoke"
    assert int(words["data.batch_size"]) * int(words["trainer.accumulate_grad_batches"]) == 8
    assert "data.batch_size=8" not in pasted.split()
    assert "Traceback" not in done.stderr


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
    assert "data.max_length=256" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
