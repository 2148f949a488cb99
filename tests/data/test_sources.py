import json

import pyarrow
import pyarrow.parquet
import pytest

from lora_lightning.data.sources import FileSource, find_sources
from lora_lightning.errors import LoraConfigError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c, “d”\u2028e", "completion": "f\ng"}]


def read(path):
    return list(FileSource(path))


def by_hand(path):
    """Writes ROWS as the file's name asks, without the reader's help."""
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8-sig")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == ".csv":
        path.write_text('prompt,completion\na,b\n"c, “d”\u2028e","f\ng"\n', encoding="utf-8")
    elif kind == ".tsv":
        path.write_text('prompt\tcompletion\na\tb\n"c, “d”\u2028e"\t"f\ng"\n', encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = read(by_hand(tmp_path / f"rows.{kind}"))
    assert [row.fields for row in rows] == ROWS
    assert all(row.problem == "" for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("r.jsonl", '{"a": 1}\n\n{"a": 2}\n', [1, 3]),
        ("r.json", '[\n {"a": 1},\n\n {"a":\n 2},\n {"a": 3}]', [2, 4, 6]),
        ("r.csv", 'a\n"1\n1"\n2\n', [2, 4]),
    ],
)
def test_rows_know_their_line(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text)
    assert [row.where for row in read(tmp_path / name)] == [f"{tmp_path / name}:{line}" for line in lines]


def test_rows_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": }\n[1]\n')
    problems = [row.problem for row in read(path)]
    assert problems[0] == ""
    assert "not valid JSON" in problems[1]
    assert "got list" in problems[2]
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n3\n")
    assert [row.problem for row in read(path)] == ["", "1 cells, the header has 2"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_not_utf8_names_file_byte_and_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'[\n{"a": "\xa3"}]')
    with pytest.raises(LoraConfigError, match=rf"{name} is not UTF-8: byte 9 \(line 2\) is 0xa3"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b'[{"a": 1}, {"a"]', "r.json:1: not valid JSON"),
        ("r.json", b'[{"a": 1}\n', "r.json:2: not valid JSON"),
        ("r.csv", b'a\n"1', "r.csv:2: not valid CSV"),
        ("r.parquet", b"no parquet", "cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraConfigError, match=message):
        read(tmp_path / name)


def names(sources):
    return [source.path.name for source in sources]


def test_a_folder_is_searched_in_order(write, tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", ".hidden/0.jsonl", "test/3.jsonl"):
        write(ROWS, f"d/{name}")
    (tmp_path / "d" / "README.md").write_text("no data")
    train, validation = find_sources(str(tmp_path / "d"))
    assert (names(train), names(validation)) == (["1.jsonl", "2.jsonl"], [])


def test_a_folder_tells_training_from_validation(write, tmp_path):
    for name in ("train-1.jsonl", "train/x.jsonl", "validation.jsonl", "other.jsonl", "test.jsonl"):
        write(ROWS, f"d/{name}")
    train, validation = find_sources(str(tmp_path / "d"))
    assert (names(train), names(validation)) == (["x.jsonl", "train-1.jsonl"], ["validation.jsonl"])


def test_what_is_not_there_is_told(write, tmp_path):
    path = write(ROWS, "chats.jsonl")
    with pytest.raises(LoraConfigError, match=r"chast.jsonl.*did you mean chats.jsonl\?"):
        find_sources(str(path.with_name("chast.jsonl")))
    (tmp_path / "chats.txt").touch()
    with pytest.raises(LoraConfigError, match=r"none of the files that can be read: \.jsonl"):
        find_sources(str(tmp_path / "chats.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraConfigError, match=r"no training data.*found: nothing"):
        find_sources(str(tmp_path / "empty"))


def test_a_hub_name_is_loaded_by_datasets(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "valid", "test"])
    asked = []

    def load(name, *, split, streaming):
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, validation = find_sources("somebody/chats", streaming=True)
    assert [row.fields for row in train[0]] == ROWS
    assert next(iter(validation[0])).where == "somebody/chats[valid] row 1"
    assert asked == [("somebody/chats", "train", True), ("somebody/chats", "valid", True)]


def test_an_unknown_hub_name_is_our_error(monkeypatch):
    import datasets

    def missing(name):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "get_dataset_split_names", missing)
    with pytest.raises(LoraConfigError, match=r"neither a file nor a folder here.*no such data set"):
        find_sources("somebody/chats")
