import json
import shutil

import pytest

from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.report import best, write_report
from lora_lightning.sweeps.report.best import keep_best
from lora_lightning.sweeps.report.collect import collect
from tests.sweeps.report.folders import believable, write_sweep


@pytest.fixture
def folder(tmp_path):
    return write_sweep(tmp_path, [believable([f"lora.r={rank}"]) for rank in (4, 8, 16)])


def content(place):
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_best_is_the_adapter_with_a_card(folder):
    sweep = collect(folder)
    place = keep_best(sweep)
    assert place == folder / "best"
    copied = content(place)
    card = json.loads(copied.pop("best.json"))
    assert copied == content(sweep.best.folder / "adapter")
    assert card["number"] == sweep.best.number
    assert card["value"] == sweep.best.metric
    assert (card["metric"], card["folder"], card["adapter"]) == ("val_loss", "2", "2/adapter")
    assert card["command"] == "python scripts/train.py experiment=smoke lora.r=16"


def test_another_best_takes_its_place_as_a_whole(folder):
    keep_best(collect(folder))
    (folder / "2" / "adapter" / "extra").mkdir()
    (folder / "2" / "adapter" / "extra" / "more.txt").write_text("more")
    keep_best(collect(folder))
    assert (folder / "best" / "extra" / "more.txt").exists()
    keep_best(collect(folder, mode="max"))
    assert content(folder / "best").keys() == {"best.json", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "best" / "best.json").read_text())["number"] == 0
    assert not list(folder.glob(".best*"))


def test_the_same_best_is_left_as_it_is(folder):
    place = keep_best(collect(folder))
    before = place.stat().st_ino
    keep_best(collect(folder))
    assert place.stat().st_ino == before
    (place / "adapter_model.safetensors").write_bytes(b"damaged")
    keep_best(collect(folder))
    assert content(place)["adapter_model.safetensors"] == content(folder / "2")["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("own", [False, True])
def test_somebodys_files_are_not_touched(folder, own):
    if own:
        keep_best(collect(folder))
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "mine.txt").write_text("mine")
    before = content(folder / "best")
    with pytest.raises(LoraConfigError, match="mine.txt" if own else "no best.json"):
        keep_best(collect(folder, mode="max"))
    assert content(folder / "best") == before


def test_a_link_or_a_file_of_that_name_is_somebodys_too(folder):
    (folder / "best").write_text("a note")
    with pytest.raises(LoraConfigError, match="Move it away"):
        keep_best(collect(folder))
    (folder / "best").unlink()
    (folder / "best").symlink_to("2/adapter")
    with pytest.raises(LoraConfigError, match="Move it away"):
        keep_best(collect(folder))


def test_what_was_there_stays_if_copying_fails(folder, monkeypatch):
    keep_best(collect(folder))
    before = content(folder / "best")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(best.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        keep_best(collect(folder, mode="max"))
    assert content(folder / "best") == before
    assert not list(folder.glob(".best*"))


def test_a_best_job_without_an_adapter_has_a_card_alone(folder):
    shutil.rmtree(folder / "2" / "adapter")
    assert content(keep_best(collect(folder))).keys() == {"best.json"}


def test_nothing_finished_is_no_best(tmp_path):
    assert keep_best(collect(write_sweep(tmp_path, [{"overrides": ["lora.r=4"]}]))) is None
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (("my.py", "-m", "--config-name", "mine", "a=1,2"), "--config-name mine "),
        (("my.py", "--multirun", "--config-dir=conf dir", "-cn", "mine"), "'--config-dir=conf dir' -cn mine "),
    ],
)
def test_the_command_of_somebodys_own_script(tmp_path, command, flags):
    sweep = collect(write_sweep(tmp_path, [believable(["a='x y'"])], command=command, script="my.py"))
    assert best.command_of(sweep, sweep.rows[0]) == f"""python my.py {flags}experiment=smoke 'a='"'"'x y'"'"''"""


def test_the_command_of_a_module(tmp_path):
    sweep = collect(write_sweep(tmp_path, [believable(["lora.r=4"])], script="lora_lightning.cli.train"))
    assert best.command_of(sweep, sweep.rows[0]).startswith("python -m lora_lightning.cli.train ")


def test_a_report_is_written_beside_somebodys_best(folder, capsys):
    (folder / "best").mkdir()
    (folder / "best" / "mine.txt").write_text("mine")
    assert write_report(folder).is_file()
    assert "Move it away" in capsys.readouterr().err
    assert [path.name for path in (folder / "best").iterdir()] == ["mine.txt"]
