"""Every YAML that is shipped: it composes, it says what its keys are for, and what it names exists."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import lora_lightning

CONF = Path(lora_lightning.__file__).parent / "conf"
PRESETS = CONF.parent / "presets"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("__pycache__", "lora"))
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml")) if path.stem[0] != "_"
]


@pytest.mark.parametrize("config", ["train", "eval"])
def test_the_primary_configs_compose(composed, config):
    cfg = composed(config=config)
    assert cfg.data._target_ == "lora_lightning.data.BBCHeadlines"
    assert cfg.name == "bbc_headlines"


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] != "hydra"])
def test_every_choice_composes(composed, group, choice):
    cfg = composed(f"{group}={choice}")
    if group not in ("experiment", "debug", "hparams_search", "scheduler"):
        assert group in cfg


def _targets(node, path=""):
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}".lstrip("."))


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] not in ("hydra", "paths", "model")])
def test_what_is_built_exists_and_takes_these_arguments(composed, group, choice):
    for path, node in _targets(OmegaConf.to_container(composed(f"{group}={choice}"), resolve=False)):
        target = get_object(node["_target_"])
        parameters = _all_parameters(target)
        unknown = [key for key in node if not key.startswith("_") and parameters is not None and key not in parameters]
        assert not unknown, f"{path}: {node['_target_']} does not take {unknown}"


def _all_parameters(target) -> set[str] | None:
    """The keywords a callable takes; those that a class hands on to its bases included."""
    if not inspect.isclass(target):
        return set(inspect.signature(target).parameters)
    names: set[str] = set()
    for base in target.__mro__:
        if "__init__" in vars(base) and base is not object:
            parameters = inspect.signature(functools.partial(base.__init__, None)).parameters.values()
            names |= {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
            if all(each.kind is not each.VAR_KEYWORD for each in parameters):
                return names
            if not base.__module__.startswith("lora_lightning"):
                return None  # it is for somebody else to say what those may be
    return names or None  # None: a class that is not written in Python


@pytest.mark.parametrize("path", sorted(PRESETS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_preset_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"(?!_|defaults:)\w+:", line):  # what is built and from what is Hydra's own language
            assert "  # " in line or lines[number - 1].startswith("#"), line


RUN_FOLDER = {
    "no job": ({}, r"outputs/smoke/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"),
    "a job": ({"SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "train"}, r"outputs/smoke/slurm-41-[0-9a-f]{8}"),
    "of an array": (
        {"SLURM_JOB_ID": "43", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"},
        r"outputs/smoke/slurm-41_2-[0-9a-f]{8}",
    ),
    "interactive": ({"SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "bash"}, r"outputs/smoke/\d{4}-.*"),
}


@pytest.mark.parametrize("kind", RUN_FOLDER)
def test_the_run_folder_is_named_after_the_experiment_and_the_time_or_the_job(composed, monkeypatch, kind):
    from hydra import compose

    environment, pattern = RUN_FOLDER[kind]
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cfg = compose("train", overrides=["experiment=smoke"], return_hydra_config=True)
    cfg.hydra.job.override_dirname = "experiment=smoke"
    assert re.fullmatch(pattern, cfg.hydra.run.dir)
    assert "sweep_" in cfg.hydra.sweep.dir


def test_the_csv_logger_comes_first_and_writes_into_the_run_folder(composed):
    for choice in ("csv", "tensorboard", "wandb", "many"):
        cfg = composed(f"logger={choice}")
        assert next(iter(cfg.logger)) == "csv"
        raw = OmegaConf.to_container(cfg.logger.csv, resolve=False)
        assert (raw["save_dir"], raw["name"], raw["version"]) == ("${paths.output_dir}", "", "")


def test_a_model_on_the_command_line_wins_over_the_experiments(composed):
    cfg = composed("experiment=bbc_headlines", "model=tiny_llama")
    assert cfg.model.name == "demo:tiny-llama"


def test_your_own_rows_go_with_the_default_experiment(composed):
    cfg = composed("data=jsonl", "data.path=chats.jsonl")
    assert cfg.data.path == "chats.jsonl"
    assert isinstance(cfg.data, DictConfig)
    assert "words" not in cfg.data
