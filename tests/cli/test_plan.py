from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_module

from lora_lightning.cli.overrides import GlobalHydraKept
from lora_lightning.cli.plan import main
from lora_lightning.cli.planned_strategy import spread_of
from lora_lightning.cli.planning import setting_of
from lora_lightning.errors import LoraConfigError

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
    assert "--compare" in call(main, "--help").stdout
    assert list(tmp_path.iterdir()) == []  # no folder of a run


def test_side_by_side(call):
    done = call(main, *SMOKE, "--compare", "lora=glob([bal*,cons*])")
    assert done.status == 0, done.stderr
    for words in ("lora=conservative", "lora=balanced", "q_proj, v_proj", "adapter file", "memory of a device"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "lora=balanced"], "one setting with several values"),
        (["--compare", "lora.target_modules=[q_proj,v_proj]"], "[q_proj],[q_proj,v_proj]"),
        (["--compare", "lora.target_modules=[q_proj],[q_porj]"], "target_modules=[q_porj]: "),
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


def planned(*overrides):
    with GlobalHydraKept(), initialize_config_module("lora_lightning.conf", version_base="1.3"):
        return setting_of(compose("plan", overrides=["experiment=smoke", "paths.output_dir=x", *overrides]))


@pytest.mark.parametrize(
    ("given", "meant"),
    [("bf16", "bf16-mixed"), ("16", "16-mixed"), ("32", "32-true"), ("null", "32-true"), ("bf16-true", "bf16-true")],
)
def test_lightnings_short_names_of_precisions(given, meant):
    assert planned(f"trainer.precision={given}").precision == meant


def test_what_is_assumed_and_not_counted_is_told():
    setting = planned("plan.memory=24GB", "data.max_length=null", "trainer=fsdp", "trainer.strategy.cpu_offload=true")
    assert [note.split(":")[0] for note in setting.notes] == [
        "trainer.strategy.cpu_offload=True is not counted",
        "data has no max_length",
    ]
    (note,) = planned("plan.memory=24GB").notes
    assert "trainer.accelerator=gpu" in note
    assert planned("plan.memory=24GB", "trainer.accelerator=gpu").notes == ()


def test_optimizers_and_machines_are_read():
    setting = planned("optimizer=lora_fa", "trainer=ddp", "trainer.devices=2", "trainer.num_nodes=3")
    assert (setting.frozen_a, setting.devices, setting.nodes) == (True, 6, 3)
    assert planned("optimizer=sgd").optimizer_bytes == 4


DEEPSPEED = {"_target_": "lightning.pytorch.strategies.DeepSpeedStrategy"}
FSDP = {"_target_": "lightning.pytorch.strategies.FSDPStrategy"}


@pytest.mark.parametrize(
    ("given", "strategy", "notes"),
    [
        ("auto", "single", 0),
        ("ddp_find_unused_parameters_true", "ddp", 0),
        ("deepspeed", "deepspeed_2", 0),
        ("deepspeed_stage_2_offload", "deepspeed_2", 1),
        ("deepspeed_stage_3_offload", "deepspeed_3", 2),
        ("fsdp_cpu_offload", "fsdp", 1),
        (DEEPSPEED | {"stage": 3, "offload_optimizer": False}, "deepspeed_3", 0),
        (DEEPSPEED | {"stage": 0}, "ddp", 0),
        (FSDP | {"sharding_strategy": "SHARD_GRAD_OP", "cpu_offload": False}, "fsdp", 1),
        (FSDP | {"sharding_strategy": "NO_SHARD"}, "ddp", 0),
        (FSDP | {"activation_checkpointing_policy": {"_target_": "x.WrapBlocks"}}, "fsdp", 1),
    ],
)
def test_strategies_as_a_plan_knows_them(given, strategy, notes):
    found = spread_of(given)
    assert (found.strategy, len(found.notes)) == (strategy, notes)


def test_lightnings_own_model_parallel_divides_layers_among_a_node():
    assert spread_of({"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}).tensor_parallel == "auto"
    with pytest.raises(LoraConfigError, match="no plan for 'xla'"):
        spread_of("xla")


def test_values_of_ones_own_are_compared(call, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.yaml").write_text("defaults: [conservative]\nr: 3\n")
    own = ("--config-dir", tmp_path, *SMOKE)
    done = call(main, *own, "lora=dora", "--compare", "lora=mine,conservative")
    assert done.status == 0, done.stderr
    (ranks,) = (line for line in done.stdout.splitlines() if line.startswith("│ r "))
    assert ranks.replace("│", "").split() == ["r", "3", "4"]
    done = call(main, *own, "--compare", "lora=mine,theirs")
    assert done.status == 1
    assert "lora=theirs: " in done.stderr
    assert "Traceback" not in done.stderr
