"""`insight.csv`, as it is written, gone on with and read."""

from dataclasses import replace

import pytest

from lora_lightning import AdapterError
from lora_lightning.reports.insight.places import Place, places_of
from lora_lightning.reports.insight.rows import InsightRow, append_rows, go_on, latest, read_rows

ROWS = [
    InsightRow(10, "layers.0.q_proj", 16, 16, 7.5, 2.25, 0.5, 6.0, 0.125, 0.25, 0.5, 4096),
    InsightRow(10, "layers.0.k_proj", 0, parameters=1024),
    InsightRow(20, "layers.0.q_proj", 16, 16, 9.5, 2.5, 0.75, 8.0, 0.25, parameters=4096),
]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "run" / "insight.csv"
    append_rows(path, ROWS[:2])
    append_rows(path, ROWS[2:])
    assert read_rows(path) == ROWS
    assert latest(read_rows(path)) == ROWS[2:]
    assert path.read_text().splitlines()[2] == "10,layers.0.k_proj,0,,,,,,,,,1024,"


def test_numbers_that_are_none_are_not_known(tmp_path):
    path = tmp_path / "insight.csv"
    append_rows(path, [InsightRow(1, "fc", 4, 4, float("nan"), float("inf"), 0.0)])
    (row,) = read_rows(path)
    assert (row.effective_rank, row.stable_rank, row.rank_used) == (None, None, 0.0)


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "insight.csv"
    append_rows(path, ROWS)
    whole = path.read_text()
    for cut in ("30,layers.0.q", "30,layers.0.q_proj,1", "30,layers.0.q_proj,16,16,7.5,2"):
        path.write_text(whole + cut)
        assert read_rows(path) == ROWS
        go_on(path, 30)
        append_rows(path, ROWS[2:])  # of the run that goes on
        assert read_rows(path) == [*ROWS, ROWS[2]]


def test_no_file_has_no_rows_and_another_file_is_told(tmp_path):
    assert read_rows(tmp_path / "insight.csv") == []
    assert latest([]) == []
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2\n")
    with pytest.raises(AdapterError, match="no column layer, r"):
        read_rows(tmp_path / "metrics.csv")


def test_what_is_done_again_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "insight.csv"
    append_rows(path, ROWS)
    go_on(path, 20)
    assert read_rows(path) == ROWS
    go_on(path, 15)
    assert read_rows(path) == ROWS[:2]
    assert [each.name for each in tmp_path.iterdir()] == ["insight.csv"]


def test_columns_that_a_file_lacks_are_added_where_a_run_goes_on_with_it(tmp_path):
    path = tmp_path / "insight.csv"
    append_rows(path, ROWS[:2])
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()))  # an older one
    go_on(path, 20)
    new = replace(ROWS[2], lesser_half=0.125)
    append_rows(path, [new])
    assert read_rows(path) == [*ROWS[:2], new]


def test_an_earlier_runs_file_is_kept(tmp_path):
    path = tmp_path / "insight.csv"
    for number in range(2):
        append_rows(path, ROWS[number : number + 1])
        go_on(path, 0)
    assert not path.exists()
    assert read_rows(tmp_path / "insight-1.csv") == ROWS[:1]
    assert read_rows(tmp_path / "insight-2.csv") == ROWS[1:2]


def test_places():
    names = [
        "model.layers.11.self_attn.q_proj",
        "model.layers.0.mlp.experts.0.up",
        "model.layers.0.mlp.experts.1.up",
        "net.0",
        "layer1.0.conv1",
        "layer2.0.conv1",
        "fc",
    ]
    assert list(places_of(names).values()) == [
        Place("q_proj", 11),
        Place("up", 0),
        Place("up", 0),
        Place("net", 0),
        Place("layer1.conv1", 0),
        Place("layer2.conv1", 0),
        Place("fc", None),
    ]
    assert places_of(["attn", "self.attn"]) == {"attn": ("attn", None), "self.attn": ("self.attn", None)}
    assert places_of([""]) == {"": ("layer", None)} or places_of([""])[""].block is None
