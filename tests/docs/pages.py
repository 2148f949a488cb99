"""The code on the pages of docs/ and in README.md: what a block says, and what stands before it for the test alone.

Comments of HTML, which nobody who reads the page sees, say what a block needs:

    <!-- with:                      code that is run before the next block, in the page's namespace
    model = tiny_llama()
    -->
    <!-- not run: wants two GPUs --> the next block cannot run here, and why
    <!-- run -->                     the next block's commands are run, not only read
    <!-- prints -->                  the next block prints what the one after it shows
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

import lora_lightning

ROOT = Path(lora_lightning.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTE = re.compile(r"<!-- (?P<kind>with|not run|run|prints)\b:?\s*(?P<text>.*?)\s*-->", re.DOTALL)
# Models of the Hub that pages name, and what stands for them here, where there is no Hub.
STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "demo:tiny-llama"}


class Block(NamedTuple):
    """A fenced block of a page, or the code of a ``with`` comment.

    Attributes:
        page: The file's name.
        line: Where its text begins.
        language: The fence's first word.
        text: What it says.
        reason: Why it is not run; empty where it is.
        really: Whether its commands are run.
        prints: Whether the block after it shows what it prints.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    really: bool = False
    prints: bool = False


def blocks_of(path: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return list(_blocks(path.name, path.read_text(encoding="utf-8")))


def _blocks(page: str, text: str) -> Iterator[Block]:
    reason, really, prints = "", False, False
    for token in MarkdownIt("commonmark").parse(text):
        line = (token.map or [0])[0] + 2  # that of the text, below the fence or the comment's first line
        if token.type == "html_block":
            for note in NOTE.finditer(token.content):
                if note["kind"] == "with":
                    yield Block(page, line, "python", note["text"])
                reason = note["text"] if note["kind"] == "not run" else reason
                really = really or note["kind"] == "run"
                prints = prints or note["kind"] == "prints"
        elif token.type == "fence":
            language = (token.info.split() or [""])[0]
            yield Block(page, line, language, token.content, reason, really, prints)
            reason, really, prints = "", False, False


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command of a shell block: comments and redirections gone, broken lines joined.

    A ``…`` is what only the reader knows, such as the time in a folder's name.
    """
    lines = block.text.replace("\\\n", " ").replace("…", "x").splitlines()
    commands = [shlex.split(re.sub(r"\s[<>] \S+", "", line), comments=True) for line in lines]
    return [words for words in commands if words]
