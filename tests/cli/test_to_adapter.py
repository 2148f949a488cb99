"""`scripts/to_adapter.py` on a run's checkpoint: the weights, and the tokenizer that the checkpoint does not hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lora_lightning.adapters.hub import copy_tokenizer
from lora_lightning.cli import to_adapter
from lora_lightning.cli.to_adapter import adapter_of_run


def test_a_checkpoint_becomes_the_folder_that_the_run_wrote(smoke, capsys, tmp_path):
    folder, _ = smoke
    to_adapter.main([str(folder / "checkpoints" / "last.ckpt"), str(tmp_path / "made")])
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "made")
    assert said.err == ""
    made, saved = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "made", folder / "adapter"))
    assert made.keys() == saved.keys()
    assert all(made[key].equal(saved[key]) for key in made)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {p.name for p in (folder / "adapter").iterdir()}


def test_the_tokenizer_comes_from_the_runs_adapter(smoke, tmp_path):
    folder, _ = smoke
    to_adapter.main([str(folder / "checkpoints" / "last.ckpt"), str(tmp_path / "made")])
    made, saved = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "made", folder / "adapter"))
    talk = [{"role": "user", "content": "What is new?"}]
    assert made.apply_chat_template(talk, tokenize=False) == saved.apply_chat_template(talk, tokenize=False)
    assert made("the minister").input_ids == saved("the minister").input_ids


def test_a_checkpoint_away_from_its_run_gives_no_tokenizer_and_says_so(smoke, capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    alone = shutil.copy(smoke[0] / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "alone.ckpt")
    to_adapter.main([str(alone)])
    said = capsys.readouterr()
    made = tmp_path / "checkpoints" / "alone-adapter"
    assert said.out.strip() == str(made)
    assert not (made / "tokenizer_config.json").exists()
    (line,) = said.err.splitlines()
    assert line.startswith(f"{made} has no tokenizer")
    assert f"none in {tmp_path / 'adapter'}" in line
    assert "takes the base model's" in line


def test_only_the_tokenizer_is_copied_with_its_folders_of_templates(tmp_path):
    source, folder = tmp_path / "adapter", tmp_path / "made"
    (source / "additional_chat_templates").mkdir(parents=True)
    folder.mkdir()
    theirs = ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    others = ["adapter_config.json", "adapter_model.safetensors", "lora_lightning.json", "README.md"]
    for name in theirs + others:
        (source / name).write_text(name)
    copy_tokenizer(source, folder)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(theirs)


@pytest.mark.parametrize(("name", "place"), [("default", "adapter"), ("style", "adapter/style")])
def test_where_a_run_leaves_its_adapter(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    assert adapter_of_run(tmp_path / "checkpoints" / "last.ckpt", name) == tmp_path / place
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert adapter_of_run(Path("last.ckpt"), name) == tmp_path / place


def test_what_is_no_checkpoint_is_a_message(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        to_adapter.main([str(tmp_path / "nothing.ckpt")])
    assert left.value.code == 1
    assert "nothing.ckpt" in capsys.readouterr().err
