import importlib.util
import sys

import pytest

from lora_lightning.data import BBCHeadlines, BBCTopics, bbc
from lora_lightning.errors import LoraConfigError

needs_stories = pytest.mark.skipif(
    importlib.util.find_spec(bbc.PACKAGE) is None, reason=f"the BBC stories are not installed: {bbc.INSTALL}"
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of 25 stories, some of them twice, in a package that must not be imported."""
    folder = tmp_path / bbc.PACKAGE
    for topic in bbc.TOPICS:
        place = folder / "bbcnews" / "data" / topic
        place.mkdir(parents=True)
        for number in range(5):
            story = f"Headline {topic} {number}\n\nBody £{max(number, 1)}\n\nabout {topic} and more words."
            place.joinpath(f"{number}.txt").write_bytes(story.encode("latin-1" if number == 4 else "utf-8"))
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, bbc.PACKAGE, raising=False)
    importlib.invalidate_caches()


def test_stories_are_read_without_importing_the_package(corpus):
    stories = bbc.read_stories()
    assert len(stories) == 25
    assert stories[4] == bbc.Story(
        "business/4.txt", "business", "Headline business 4", "Body £4\n\nabout business and more words."
    )
    assert stories[3].body.startswith("Body £3")


def test_headlines(corpus, tokenizer, capsys):
    data = BBCHeadlines(words=3, val_rows=6, tokenizer=tokenizer)
    data.setup("fit")
    out = capsys.readouterr().out
    assert "⟦Headline business" in out
    train, val, _, _ = data.records()
    assert (len(train), len(val)) == (19, 6)
    for record in train + val:
        topic, number = record.where.removesuffix(".txt").split("/")
        body = f"Body £{max(int(number), 1)} about"
        assert record.messages[0]["content"] == f"Write a headline for this news story:\n\n{body}"
        assert record.messages[1]["content"] == f"Headline {topic} {number}"
    twins = [{r.where for r in rows} & {"tech/0.txt", "tech/1.txt"} for rows in (train, val)]
    assert set() in twins
    assert data.sample_prompts()[0].shown.startswith("Body £")


def test_topics(corpus, tokenizer, capsys):
    data = BBCTopics(words=5, val_rows=6, train_rows=10, tokenizer=tokenizer)
    assert (data.num_labels, data.label_names[1]) == (5, "entertainment")
    data.setup("fit")
    assert "its topic is business" in capsys.readouterr().out
    assert (len(data.loaded.train), len(data.loaded.validation)) == (10, 6)
    for batch in data.train_dataloader():
        assert batch["labels"].ndim == 1
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
            assert tokenizer.decode(ids.tolist()).split(" ")[1] == bbc.TOPICS[label]
    assert data.sample_prompts()[0].reference in bbc.TOPICS


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraConfigError, match=bbc.INSTALL):
        BBCHeadlines().prepare_data()


def test_more_rows_than_there_are(corpus, tokenizer):
    with pytest.raises(LoraConfigError, match=r"val_rows must lie between 1 and 24.*got val_rows=25"):
        BBCTopics(val_rows=25, tokenizer=tokenizer).setup()


@needs_stories
def test_the_real_stories():
    stories = bbc.read_stories()
    assert len(stories) == 2225
    assert all(story.headline and story.body for story in stories)
    assert not any("Â£" in story.body for story in stories)
    train, val = bbc.split_stories(stories, 225, None, 0)
    assert (len(train), len(val)) == (2000, 225)
    assert not {s.fingerprint for s in train} & {s.fingerprint for s in val}
