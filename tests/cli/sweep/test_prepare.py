"""What the jobs of a sweep need, made ready once however many jobs there are."""

from __future__ import annotations

import itertools

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from lora_lightning.cli.sweep import prepare
from lora_lightning.errors import LoraConfigError

FAST = ("experiment=smoke", "data.rows=32", "data.val_rows=8")


@pytest.fixture
def jobs():
    """Composes the jobs of a grid, with Hydra's own part: jobs(["lora.r=2", "lora.r=4"], ["seed=1"])."""
    GlobalHydra.instance().clear()
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        yield lambda *swept: [
            compose("train", overrides=[*FAST, *each], return_hydra_config=True) for each in itertools.product(*swept)
        ]
    GlobalHydra.instance().clear()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "_done", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("swept", "different"),
    [
        ((["lora.r=2", "lora.r=4"], ["learning_rate=1e-3", "learning_rate=1e-2"]), 1),
        ((["data.batch_size=2", "data.batch_size=4"], ["model.dtype=float32", "model.dtype=auto"]), 1),
        ((["seed=1", "seed=2"], ["lora.r=2", "lora.r=4"]), 2),  # the seed chooses the rows
        (
            (["data.max_length=64", "data.max_length=32"], ["model.chat_template=null", "model.chat_template='{{x}}'"]),
            4,
        ),
    ],
)
def test_settings_that_come_to_the_same_files_are_prepared_once(jobs, swept, different):
    assert len(prepare.distinct(jobs(*swept))) == different


def test_it_is_done_before_and_not_again(jobs, tmp_path, capfd):
    prepare.prepare_all(jobs(["lora.r=2", "lora.r=4"], ["seed=1", "seed=2"]))
    folders = [each for each in (tmp_path / "cache" / "lora_lightning" / "data").iterdir() if each.is_dir()]
    assert len(folders) == 2
    told = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("Model demo:tiny-llama: ") for line in told) == 1
    assert sum(line.startswith("Rows of TinyText: ") for line in told) == 2
    prepare.prepare_all(jobs(["lora.r=8", "lora.r=16"], ["seed=1", "seed=2"]))  # the next batch of a search
    assert capfd.readouterr().out == ""


def test_all_that_cannot_be_had_is_told_at_once(jobs, tmp_path):
    wrong = jobs(["model=hub"], [f"model.name={tmp_path}/one", f"model.name={tmp_path}/two"], ["data=tiny_text"])
    with pytest.raises(LoraConfigError, match=r"none was started:\n(?s:.*)/one(?s:.*)/two"):
        prepare.prepare_all(wrong)


def test_one_job_and_scripts_of_others_prepare_by_themselves(jobs, tmp_path, capfd):
    prepare.prepare_all(jobs(["seed=1"]))
    others = jobs(["seed=1", "seed=2"])
    for each in others:
        each.hydra.runtime.config_sources[1].path = "somebody.else"
    assert prepare.distinct(others) == []
    prepare.prepare_all(others)
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "cache").exists()
