from __future__ import annotations

import json

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
