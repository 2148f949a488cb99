"""The command on a run's page is one that runs the same again."""

import json

import pytest

from lora_lightning.cli import train
from lora_lightning.cli.again import command_again
from lora_lightning.cli.sweep.command import job_command, job_variables
from tests.cli.conftest import ROOT


def test_the_command_is_the_one_that_was_typed():
    assert command_again(["a=1"], ["scripts/train.py", "a=1"], {}) == "python scripts/train.py a=1"
    # What the console command leaves in argv.
    assert command_again(["a=1"], [train.__file__, "a=1"], {}) == "lora-lightning train a=1"


def test_which_configuration_it_was_and_hydras_settings_are_kept_but_the_folder():
    typed = ["--config-dir=mine", "-cn", "other", "hydra.run.dir=outputs/x", "hydra/job_logging=none", "a=1"]
    assert (
        command_again(["a=1"], ["scripts/train.py", *typed], {})
        == "python scripts/train.py --config-name other --config-dir mine hydra/job_logging=none a=1"
    )


@pytest.mark.parametrize("going_on", ["resume=auto", "ckpt_path=last"])
def test_what_goes_on_with_a_run_does_so_in_its_folder(going_on):
    typed = ["scripts/train.py", going_on, "hydra.run.dir=outputs/x"]
    assert command_again([going_on], typed, {}) == f"python scripts/train.py hydra.run.dir=outputs/x {going_on}"
    assert command_again([going_on], typed, job_variables("sweep", 0)) == f"python scripts/train.py {going_on}"


def test_a_job_is_run_alone(tmp_path):
    script = ROOT / "scripts" / "train.py"
    job = job_command(["a=1"], tmp_path, argv=[str(script), "-m", "--config-dir", "mine", "a=1,2"])
    assert command_again(["a=1"], job[1:], {}).endswith("train.py --config-dir mine a=1")


def test_torchrun_starts_as_many_processes():
    environment = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    begin = "torchrun --nproc-per-node=2"
    assert command_again(["a=1"], ["my/train.py"], environment) == f"{begin} my/train.py a=1"
    assert (
        command_again(["a=1"], [train.__file__], environment | {"GROUP_WORLD_SIZE": "3"})
        == f"{begin} --nnodes=3 -m lora_lightning.cli.train a=1"
    )


@pytest.mark.parametrize("foreign", [["-f", "k.json"], ["-c", "setup.cfg"], ["--node-port=1", "hydra.x=1"]])
def test_another_programs_arguments_are_not_read(foreign, capfd):
    assert command_again(["a=1"], ["kernel.py", *foreign], {}) == "python kernel.py a=1"
    assert capfd.readouterr() == ("", "")


def test_it_stands_in_the_folder_of_a_run(smoke):
    folder, _ = smoke
    command = json.loads((folder / "about.json").read_text())["command"]
    assert command.endswith("scripts/train.py experiment=smoke lora.r=64 lora.use_rslora=true logger=wandb")
