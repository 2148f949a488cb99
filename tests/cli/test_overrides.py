"""What is told about a command that cannot work."""

from __future__ import annotations

import pytest
from hydra.core.global_hydra import GlobalHydra

from lora_lightning.cli import train
from lora_lightning.cli.overrides import check_command
from lora_lightning.cli.told import CommandError
from lora_lightning.errors import LoraConfigError


def refusal(*arguments: str, config: str = "train") -> CommandError:
    with pytest.raises(CommandError) as raised:
        check_command(["scripts/train.py", *arguments], config)
    return raised.value


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lora.rank=8", "lora.r=8"),
        ("lora.alpha=8", "lora.lora_alpha=8"),
        ("lora.dropout=0.1", "lora.lora_dropout=0.1"),
        ("rank=8", "lora.r=8"),
        ("lr=1e-4", "optimizer.lr=1e-4"),
        ("epochs=3", "trainer.max_epochs=3"),
        ("loar.r=8", "lora.r=8"),
        ("lora.lora_alhpa=8", "lora.lora_alpha=8"),
        ("lora.aplha=8", "lora.lora_alpha=8"),
        ("use_rslora=true", "lora.use_rslora=true"),
        ("batch_size=2", "data.batch_size=2"),
        ("trainer.max_step=10", "trainer.max_steps=10"),
        ("experment=smoke", "experiment=smoke"),
        ("lora=high_capcity", "lora=high_capacity"),
        (["+lora.rank_pattern=1", "lora.rank_pattern.q_proj=8"][1], "+lora.rank_pattern.q_proj=8"),
        ("trainer.benchmark=true", "+trainer.benchmark=true"),
        ("debug=null", "'~debug'"),
    ],
)
def test_the_whole_corrected_command_is_printed(typed, meant):
    error = refusal("experiment=bbc_topics" if "experment" not in typed else "seed=1", typed, "seed=3")
    first = "experiment=bbc_topics" if "experment" not in typed else "seed=1"
    assert error.command == f"python scripts/train.py {first} {meant} seed=3"
    assert error.command in str(error)
    assert isinstance(error, LoraConfigError)


def test_the_issue_of_the_wrong_word():
    assert "did you mean lora.r?" in str(refusal("lora.rank=8"))


def test_the_corrected_command_works():
    command = refusal("experiment=smoke", "rank=8", "alpha=3").command
    check_command(command.split()[1:], "train")


def test_everything_that_is_wrong_is_told_at_once():
    message = str(refusal("lora.rank=8", "model=gpt", "lora.bias=some", "lora.r=0", "data=jsonl"))
    for part in (
        "lora.r?",
        "there are hub, minilm_l6, smollm2_135m, tiny_llama",
        "bias must be one of",
        "r must be at",
    ):
        assert part in message
    assert "data.path has no value yet" in message


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("lora.r=0", "r must be at least 1, got 0"),
        ("lora.r=-4", "r must be at least 1, got -4"),
        ("lora.r=8.5", "r must be a whole number of at least 1, got 8.5"),
        ("lora.r=abc", "r must be a whole number of at least 1, got 'abc'"),
        ("lora.lora_dropout=1.5", "lora_dropout must be a probability"),
        ("lora.target_modules=[]", "target_modules is an empty list"),
        ("+lora.rank=8", "it is called 'r' here"),
        ("nothing.like.it=1", "unknown key 'nothing.like.it'"),
        ("experiment=none", "there are bbc_headlines, bbc_topics, own, smoke"),
        ("model=hub", "model.name has no value yet"),
        ("lora.r=[", "needs quotes"),
    ],
)
def test_a_wrong_value_is_told_before_anything_starts(typed, part):
    error = refusal(typed)
    assert part in str(error)
    assert error.command is None


def test_no_underscored_choice_is_offered():
    assert "_common" not in str(refusal("data=nothing"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["lora.r=64", "lora.use_rslora=true"],
        ["--cfg", "job", "--package", "lora"],
        ["--info", "defaults"],
        ["--cfg", "job", "model=hub"],  # to look at a config one need not have filled it in
        ["--help", "lora.rank=8"],
        ["-sc", "install=bash"],
        ["--multirun", "lora.r=4,8,16", "lora=balanced,conservative"],
        ["-m", "optimizer.lr=interval(1e-5,1e-3)"],
        ["--config-name", "somebody_elses", "rank=8"],
        ["+trainer.benchmark=true", "~callbacks.samples", "hydra.run.dir=/somewhere"],
        ["lora.target_modules=[q_proj,v_proj]", "lora.layers_to_transform=[0,1]"],
    ],
)
def test_what_is_right_passes(arguments):
    check_command(["scripts/train.py", *arguments], "train")


def test_a_choice_of_a_sweep_is_checked_too():
    assert "no choice 'huge'" in str(refusal("-m", "lora=balanced,huge"))


def test_every_value_of_a_swept_key_is_tried():
    message = str(refusal("-m", "lora.r=8,0,x", "lora.lora_dropout=0,0.5,2", "learning_rate=range(1,1)"))
    assert "r must be at least 1, got 0" in message
    assert "r must be a whole number of at least 1, got 'x'" in message
    assert "lora_dropout must be a probability in [0, 1), got 2" in message
    assert "learning_rate=range(1,1) gives learning_rate no values" in message


@pytest.mark.parametrize("typed", [["sweep.dry_run=true", "sweep.devices_per_job=2"], ["hparams_search=optuna"]])
def test_settings_of_a_sweep_are_known(typed):
    check_command(["scripts/train.py", "-m", "lora.r=4,8", *typed], "train")
    assert "did you mean sweep.fail_fast?" in str(refusal("-m", "sweep.failfast=true"))


def test_a_choice_is_no_range_of_numbers():
    assert "chosen by name" in str(refusal("-m", "lora=interval(1,3)"))


@pytest.mark.parametrize("typed", ["lora=null", "~lora", "lora=[balanced,null]", "~lora=balanced"])
def test_a_group_that_every_run_reads_cannot_be_left_out(typed):
    error = refusal("experiment=smoke", typed)
    assert f"{typed}: lora cannot be left out" in str(error)
    assert "balanced, conservative, corda, dora, eva, high_capacity" in str(error)
    assert error.command is None


@pytest.mark.parametrize("group", ["model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger"])
def test_so_with_every_group_that_has_a_key(group):
    assert f"~{group}: {group} cannot be left out" in str(refusal(f"~{group}"))


def test_groups_that_only_set_keys_of_others_can_be_left_out():
    check_command(["scripts/train.py", "~debug", "~experiment"], "train")
    assert refusal("experiment=null").command == "python scripts/train.py '~experiment'"


def test_in_a_sweep_no_tilde_takes_the_place_of_a_choice():
    error = refusal("-m", "debug=null,overfit")
    assert "~debug" in str(error)
    assert error.command is None


def test_the_package_run_as_a_module_is_told_so():
    with pytest.raises(CommandError) as raised:
        check_command([train.__file__, "lora.rank=8"], "train")
    assert raised.value.command == "python -m lora_lightning.cli.train lora.r=8"


def test_the_way_the_program_was_called_is_kept():
    with pytest.raises(CommandError) as raised:
        check_command(["/site-packages/lora_lightning/cli/train.py", "rank=8"], "train", command="lora-train")
    assert raised.value.command == "lora-train lora.r=8"


def test_a_callers_own_hydra_is_left_as_it_is():
    GlobalHydra.instance().clear()
    refusal("rank=8")
    assert not GlobalHydra.instance().is_initialized()


def test_eval_knows_its_own_keys():
    check_command(["scripts/eval.py", "adapter=folder", "split=test"], "eval")
    assert refusal("adaptor=folder", config="eval").command.endswith("adapter=folder")
