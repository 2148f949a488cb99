import inspect
import json
import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import normalizers

from lora_lightning.data import TextData, TinyText, cache
from lora_lightning.data.cache import cache_folder, fingerprint
from lora_lightning.data.chats import ChatDataModule
from lora_lightning.data.flat import FlatRows
from lora_lightning.data.module import DataModule
from lora_lightning.errors import LoraConfigError
from tests.data.conftest import CHATML, NO_END, train_tokenizer
from tests.data.test_flat import same


@pytest.fixture
def bad(write):
    """Rows of which some are dropped and some are cut."""
    rows = [{"prompt": "question " * (n % 9 + 1), "completion": f"answer {n}"} for n in range(60)]
    rows[7] = {"prompt": "a question", "completion": ""}
    return str(write([*rows, {"prompt": "row " * 90, "completion": "too late"}]))


def text(path, tokenizer=None, **options):
    if tokenizer is None:
        tokenizer = train_tokenizer()
        tokenizer.chat_template = CHATML
    return TextData(path, tokenizer=tokenizer, **{"max_length": 60, **options})


def told(data):
    console = Console(record=True, width=200)
    with console.capture() as captured:
        console.print(data.describe())
    return captured.get()


def set_up(*arguments, **options):
    data = text(*arguments, **options)
    data.setup()
    return data


@pytest.fixture
def tokenised(monkeypatch):
    """Counts how often rows are made."""
    made, load = [], TextData.load
    monkeypatch.setattr(TextData, "load", lambda self, tokenizer: made.append(1) or load(self, tokenizer))
    return made


def check_same(ours, theirs):
    for part in ("train", "validation"):
        same(getattr(ours.loaded, part).examples, getattr(theirs.loaded, part).examples)
    assert ours.loaded.tallies == theirs.loaded.tallies
    assert ours.loaded.prompts == theirs.loaded.prompts
    assert told(ours) == told(theirs)


@pytest.mark.parametrize("template", [CHATML, NO_END, None])
def test_rows_and_what_is_told_are_those_without_a_cache(bad, tmp_path, tokenised, template):
    def with_template(**options):
        tokenizer = train_tokenizer()
        tokenizer.chat_template = template
        data = text(bad, tokenizer, **options)
        data.setup()
        return data

    fresh = with_template()
    tallies = fresh.loaded.tallies.values()
    assert sum(tally.bad for tally in tallies) == sum(tally.unanswered for tally in tallies) == 1
    first, second = (with_template(cache=str(tmp_path / "kept")) for _ in range(2))
    assert len(tokenised) == 2
    check_same(first, fresh)
    check_same(second, fresh)
    assert second.tokenizer.chat_template == fresh.tokenizer.chat_template  # generation needs it too
    assert isinstance(second.loaded.train.examples, FlatRows)
    for ours, theirs in zip(second.train_dataloader(), fresh.train_dataloader(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_rows_for_validation(bad, tmp_path):
    check_same(set_up(bad, val_split=0, cache=str(tmp_path)), set_up(bad, val_split=0))


def test_where_they_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(True) == tmp_path / "lora_lightning" / "data"
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"


# ---- fingerprints


def with_merge(tokenizer):
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["model"]["merges"] = inner["model"]["merges"][:-1]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(inner))


def with_normaliser(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


TOKENIZERS = {
    "an added token": lambda tokenizer: tokenizer.add_tokens(["headline"]),
    "a merge": with_merge,
    "the normaliser": with_normaliser,
    "the end-of-text token": lambda tokenizer: setattr(tokenizer, "eos_token", "<|begin|>"),
    "the template": lambda tokenizer: setattr(tokenizer, "chat_template", CHATML.replace("\n", " ")),
}
OPTIONS = {
    "max_length": 50, "train_on": "last", "system_prompt": "Be brief.", "val_split": 0.3, "seed": 5, "samples": 1,
    "format": "prompt_completion", "on_bad_row": "error", "chat_template": NO_END,
}  # fmt: skip
DEALING = {
    "batch_size": 9, "val_batch_size": 9, "num_workers": 1, "group_by_length": False, "pad_to_multiple_of": 8,
    "packing": True, "cache": "elsewhere",
}  # fmt: skip


def key(data):
    return fingerprint(data, data.tokenizer)


@pytest.mark.parametrize("what", TOKENIZERS)
def test_another_tokenizer_is_another_fingerprint(bad, what):
    data = text(bad)
    before = key(data)
    assert key(text(bad)) == before
    TOKENIZERS[what](data.tokenizer)
    assert key(data) != before


def test_what_a_call_leaves_in_the_tokenizer_does_not_count(bad):
    data = text(bad)
    before = key(data)
    data.tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
    assert key(data) == before


@pytest.mark.parametrize("name", OPTIONS)
def test_another_option_is_another_fingerprint(bad, name):
    assert key(text(bad, **{name: OPTIONS[name]})) != key(text(bad))


@pytest.mark.parametrize("name", DEALING)
def test_how_rows_are_dealt_out_does_not_count(bad, name):
    assert key(text(bad, **{name: DEALING[name]})) == key(text(bad))


def test_every_option_is_known_to_count_or_not():
    kinds = (TextData, ChatDataModule, DataModule)
    names = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    assert names - {"self", "options", "path", "val_path", "streaming", "tokenizer"} == {*OPTIONS, *DEALING}


def test_content_counts_and_not_its_time(bad, tmp_path):
    data = text(bad)
    before, times = key(data), os.stat(bad)
    content = Path(bad).read_text()
    os.utime(bad, (1, 1))
    assert key(text(bad)) == before
    Path(bad).write_text(content.replace("answer 3", "answer 4", 1))  # equally long
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(bad).st_size == times.st_size
    assert key(text(bad)) != before


def test_validation_rows_and_a_template_file_count(bad, write, tmp_path):
    rows = write([{"prompt": "p", "completion": "c"}], "val.jsonl")
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)
    options = {"val_path": str(rows), "chat_template": str(template)}
    before = key(text(bad, **options))
    write([{"prompt": "p", "completion": "d"}], "val.jsonl")
    after = key(text(bad, **options))
    assert after != before
    template.write_text(CHATML.replace("\n", " "))
    assert key(text(bad, **options)) != after


def test_the_code_counts(bad, monkeypatch):
    before = key(text(bad))
    monkeypatch.setattr(cache, "_code", lambda: {"encode.py": "another"})
    after = key(text(bad))
    assert after != before
    monkeypatch.setattr(cache, "version", lambda package: "0")
    assert key(text(bad)) not in (before, after)


def test_a_template_that_tells_the_day_counts_the_day(bad, monkeypatch):
    class Tomorrow:
        @staticmethod
        def today():
            return "tomorrow"

    dated = CHATML + "{# strftime_now #}"
    plain, before = key(text(bad)), key(text(bad, chat_template=dated))
    monkeypatch.setattr(cache, "date", Tomorrow)
    assert key(text(bad)) == plain
    assert key(text(bad, chat_template=dated)) != before


def test_made_up_rows_and_unknown_ones(tokenizer):
    assert key(TinyText(tokenizer=tokenizer)) != key(TinyText(tokenizer=tokenizer, rows=9))

    class Own(TinyText):
        content = DataModule.content

    with pytest.raises(LoraConfigError, match="Own does not say what its rows are made of"):
        key(Own(tokenizer=tokenizer))


def test_an_option_that_cannot_be_compared_is_refused(bad):
    data = text(bad)
    data.words = object()
    with pytest.raises(LoraConfigError, match=r"cannot be told whether.*data.cache=false"):
        key(data)


# ---- damage and company


def kept_folder(folder):
    [found] = [path for path in folder.iterdir() if path.is_dir()]
    return found


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no about", "half an about", "changed about", "empty"])
def test_damaged_rows_are_made_again(bad, tmp_path, tokenised, damage):
    first = set_up(bad, cache=str(tmp_path / "kept"))
    folder = kept_folder(tmp_path / "kept")
    file, about = folder / "train" / "labels.bin", folder / "about.json"
    content = file.read_bytes()
    if damage == "empty":
        for path in (*folder.glob("*/*"), about):
            path.unlink()
    elif "about" in damage:
        now = about.read_text()
        about.write_text(now[: len(now) // 2] if damage == "half an about" else now.replace("answer", "ansver"))
        if damage == "no about":
            about.unlink()
    else:
        # Written beside and renamed, as another program would: the first run has the old file mapped.
        file.unlink()
        if damage != "gone":
            file.write_bytes(content[:-4] if damage == "cut" else b"\1" + content[1:])
    again = set_up(bad, cache=str(tmp_path / "kept"))
    assert len(tokenised) == 2
    check_same(again, first)
    check_same(set_up(bad, cache=str(tmp_path / "kept")), first)
    assert len(tokenised) == 2
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_is_taken_away(bad, tmp_path):
    data = text(bad, cache=str(tmp_path))
    left = tmp_path / f".{key(data)}-abc" / key(data)
    left.mkdir(parents=True)
    data.setup()
    assert not left.exists()


def test_nothing_is_kept_of_rows_that_cannot_be_made(write, tmp_path):
    path = str(write([{"wrong": 1}] * 5))
    with pytest.raises(LoraConfigError, match="rows cannot be used"):
        set_up(path, cache=str(tmp_path / "kept"))
    assert not [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_written_to(bad, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraConfigError, match="cannot be kept in"):
        set_up(bad, cache=str(tmp_path / "file"))


def test_streams_are_not_kept():
    with pytest.raises(LoraConfigError, match="streaming=true reads rows while training, so cache must be false"):
        TextData("x", cache=True, streaming=True)


def one_of_many(path, folder, together, sums):
    load = TextData.load

    def slow(self, tokenizer):
        with open(folder / "made", "a") as file:
            file.write("x")
        time.sleep(0.3)  # for the others to come meanwhile
        return load(self, tokenizer)

    TextData.load = slow
    together.wait()
    data = set_up(path, cache=str(folder))
    sums.put(total(data))


def total(data):
    return sum(example["input_ids"].sum().item() for example in data.loaded.train.examples)


def test_of_several_processes_one_makes_the_rows(bad, tmp_path):
    context, folder = get_context("fork"), tmp_path / "kept"
    folder.mkdir()
    together, sums = context.Barrier(3), context.Queue()
    processes = [context.Process(target=one_of_many, args=(bad, folder, together, sums)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [sums.get(timeout=500) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (folder / "made").read_text() == "x"
    assert set(found) == {total(set_up(bad))}
