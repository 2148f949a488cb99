"""What a command line means by an adapter, and what it is told where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lightning.cli.which_adapter import Which, which_adapter
from lora_lightning.errors import AdapterError

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
