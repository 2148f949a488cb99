"""What a command line means by an adapter, and what it is told where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lightning.cli.which_adapter import Which, origin_of, run_named, which_adapter
from lora_lightning.errors import AdapterError, LoraConfigError

CONFIG = "lora: {r: 8}\nmodel: {name: demo:tiny-llama}\ndata: {_target_: a.B}\ntask: {_target_: a.C}\n"


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    adapter(folder / "adapter")
    adapter(folder / "checkpoints" / "step00030-adapter")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def test_an_adapter_folder_is_itself(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "mine")
    assert which_adapter(folder) == Which(str(folder), None)


@pytest.mark.parametrize("inside", ["", "adapter", "checkpoints/step00030-adapter"])
def test_a_run_is_known_from_each_of_its_adapters(run: Path, inside: str) -> None:
    assert which_adapter(run / inside) == Which(str(run / (inside or "adapter")), run)


def test_a_named_adapter_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    folder = adapter(tmp_path / "adapter" / "polite")
    assert which_adapter(tmp_path) == Which(str(folder), tmp_path)
    assert which_adapter(folder).run == tmp_path
    adapter(tmp_path / "adapter" / "rude")
    with pytest.raises(AdapterError, match=r"holds several adapters.*newest first:\n  - .*(polite|rude)"):
        which_adapter(tmp_path)


def test_a_name_on_the_hub_is_left_to_the_hub() -> None:
    assert which_adapter("owner/name@v1.0") == Which("owner/name@v1.0", None)


def test_below_a_folder_of_this_machine_a_name_is_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(AdapterError, match=r"did you mean step00030-adapter.* is checkpoints/step00030@main"):
        which_adapter("checkpoints/step00030")
    assert which_adapter("checkpoints/step00030@main").adapter == "checkpoints/step00030@main"
    assert which_adapter("owner/name").adapter == "owner/name"


@pytest.mark.parametrize("name", ["adapter", "adapter/polite"])
def test_the_best_of_a_sweep_belongs_to_the_job_that_it_was_copied_from(tmp_path: Path, name: str) -> None:
    original, best = adapter(tmp_path / "3" / name), adapter(tmp_path / "best")
    (tmp_path / "3" / "config.yaml").write_text(CONFIG)
    (best / "best.json").write_text(json.dumps({"folder": "3", "adapter": f"3/{name}"}))
    assert which_adapter(best) == Which(str(best), tmp_path / "3")
    assert origin_of(best) == original
    (best / "best.json").write_text("[]")
    assert which_adapter(best).run is None


def test_a_run_that_is_named_has_to_be_one(run: Path) -> None:
    assert run_named(run) == run
    with pytest.raises(LoraConfigError, match=r"not the folder of a run.*It lies in one: .*run$"):
        run_named(run / "adapter")
    with pytest.raises(LoraConfigError, match=r"no folder .*rum \(did you mean run\?\)"):
        run_named(run.parent / "rum")


def test_a_folder_above_names_the_adapters_below(run: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        which_adapter(run.parent)
    assert str(run / "adapter") in str(caught.value)
    assert str(run / "checkpoints" / "step00030-adapter") in str(caught.value)


def test_an_empty_run_says_what_it_holds_and_what_to_make(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("")
    with pytest.raises(AdapterError, match=r"no adapter in .*it holds train\.log\)$"):
        which_adapter(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")
    with pytest.raises(AdapterError, match=r"lora-lightning to-adapter .*last\.ckpt"):
        which_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"is a file.*lora-lightning to-adapter .*last\.ckpt"):
        which_adapter(tmp_path / "checkpoints" / "last.ckpt")


def test_a_folder_that_is_not_there(run: Path) -> None:
    with pytest.raises(AdapterError, match=r"there is no folder .*adaptr \(did you mean adapter\?\)"):
        which_adapter(run / "adaptr")
    with pytest.raises(AdapterError, match=r"there is .*run, which holds adapter, checkpoints, config\.yaml"):
        which_adapter(run / "not" / "here")
    with pytest.raises(AdapterError, match="is a file"):
        which_adapter(run / "adapter" / "adapter_config.json")


@pytest.mark.parametrize("content", ["model: {model: demo:tiny-llama}\ndata: {rows: 8}\n", "- 1\n", "a: {\n", "\x00"])
def test_settings_of_other_programs_make_no_run(tmp_path: Path, content: str) -> None:
    folder = adapter(tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(content)  # where LightningCLI writes its own
    assert which_adapter(folder).run is None
    assert which_adapter(tmp_path) == Which(str(folder), None)
    with pytest.raises(LoraConfigError, match="not the folder of a run"):
        run_named(tmp_path)
