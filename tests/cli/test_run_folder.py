"""Nobody's products are written over."""

from __future__ import annotations

import json

import pytest

from lora_lightning.cli.run_folder import checkpoint_in, claim, is_first_process, keep, kept
from lora_lightning.errors import LoraConfigError


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "GLOBAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def finished(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))
    (folder / "metrics.csv").write_text("step")
    return folder


def everything_in(folder):
    """What lies in a folder, to the byte."""
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


def test_a_new_folder_is_taken(tmp_path):
    claim(tmp_path / "new", resuming=False)
    claim(tmp_path, resuming=False)
    assert everything_in(tmp_path) == {}  # made by whoever writes to it


@pytest.mark.parametrize("resuming", [False, True])
def test_what_hydra_has_written_counts_for_nothing(tmp_path, resuming):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("")
    (tmp_path / "train.log").write_text("")
    before = everything_in(tmp_path)
    claim(tmp_path, resuming=resuming)
    assert everything_in(tmp_path) == before


def test_a_run_that_failed_before_it_left_anything_may_be_repeated(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"status": "failed"}))
    (tmp_path / "checkpoints").mkdir()
    before = everything_in(tmp_path)
    claim(tmp_path, resuming=False)
    assert everything_in(tmp_path) == before
    (tmp_path / "checkpoints" / "last.ckpt").write_text("something")
    with pytest.raises(LoraConfigError, match=r"checkpoints, result\.json, which would be overwritten"):
        claim(tmp_path, resuming=False)


@pytest.mark.parametrize("product", ["adapter", "checkpoints"])
def test_products_are_refused_and_left_alone(tmp_path, product):
    (tmp_path / product).mkdir()
    (tmp_path / product / "file").write_text("precious")
    with pytest.raises(LoraConfigError, match=f"{product}.*would be overwritten") as raised:
        claim(tmp_path, resuming=False)
    assert "resume=auto" in str(raised.value)
    assert (tmp_path / product / "file").read_text() == "precious"


def test_a_finished_result_alone_is_refused(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"status": "finished"}))
    with pytest.raises(LoraConfigError, match=r"result\.json"):
        claim(tmp_path, resuming=False)


def test_resuming_moves_files_aside_and_keeps_the_rest(tmp_path):
    finished(tmp_path)
    claim(tmp_path, resuming=True)
    assert json.loads((tmp_path / "result-1.json").read_text()) == {"status": "finished"}
    assert (tmp_path / "metrics-1.csv").exists()
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_keeping_finds_a_free_name_each_time(tmp_path):
    for number in range(3):
        (tmp_path / "eval.json").write_text(str(number))
        keep(tmp_path / "eval.json")
    assert [(tmp_path / f"eval-{number}.json").read_text() for number in (1, 2, 3)] == ["0", "1", "2"]


def test_what_was_kept_is_found_in_the_order_of_its_parts(tmp_path):
    for number in range(12):
        (tmp_path / "metrics.csv").write_text(str(number))
        keep(tmp_path / "metrics.csv")
    for other in ("metrics-x.csv", "my-metrics-1.csv", "metrics-1.csv.bak"):
        (tmp_path / other).write_text("somebody's")
    assert [path.read_text() for path in kept(tmp_path / "metrics.csv")] == [str(number) for number in range(12)]
    assert kept(tmp_path / "eval.json") == []


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"])
def test_other_processes_do_not_ask(tmp_path, monkeypatch, variable):
    before = everything_in(finished(tmp_path))
    with pytest.raises(LoraConfigError):
        claim(tmp_path, resuming=False)
    monkeypatch.setenv(variable, "1")
    assert not is_first_process()
    for resuming in (False, True):
        claim(tmp_path, resuming=resuming)
        assert everything_in(tmp_path) == before
    monkeypatch.setenv(variable, "0")
    assert is_first_process()


def test_the_last_checkpoint_of_a_folder_without_any_is_told_where_to_look(tmp_path):
    with pytest.raises(
        LoraConfigError, match=rf"no whole checkpoint in {tmp_path / 'checkpoints'}\. .*hydra\.run\.dir="
    ):
        checkpoint_in(tmp_path, "last")
    assert checkpoint_in(tmp_path, None) is None
