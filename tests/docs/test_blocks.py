"""Every block of code on every page: Python runs, commands are understood, the most important ones run too."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_module

from lora_lightning.cli import launch, overrides, train
from lora_lightning.cli.main import _COMMANDS
from tests.docs.pages import PAGES, ROOT, STAND_INS, Block, blocks_of, commands_of

GENERATED = {"api.md"}  # signatures; what its examples were is run as doctests, where they stand
# Languages that are for reading.
SHOWN = ("text", "json", "jinja", "diff")


class Understood(Exception):
    """Raised in place of doing what a command says, when all of it has been read."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, demo_cache):
    """An empty folder to stand in, where nothing is trained by chance on what lies around."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # what tables are drawn for
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # training sets these; taken back after the test
        monkeypatch.setenv(name, "0")
    return tmp_path


@pytest.fixture(scope="module")
def one_hydra():
    """Hydra is set up once for all commands, and composes what two of them share once: half of the time."""
    composed, compose = {}, overrides._compose

    def once(config_name, chosen):
        key = (config_name, *(each.input_line for each in chosen))
        if key not in composed:
            composed[key] = compose(config_name, chosen)
        return composed[key]

    start = functools.partial(initialize_config_module, "lora_lightning.conf", version_base="1.3")
    with pytest.MonkeyPatch.context() as patch, overrides.GlobalHydraKept(), start():
        patch.setattr(overrides, "GlobalHydraKept", contextlib.nullcontext)
        patch.setattr(overrides, "initialize_config_module", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(overrides, "_compose", once)
        yield


@pytest.fixture
def reading(one_hydra, monkeypatch):
    """Commands stop when their arguments have been read: argparse's after parsing, Hydra's after they were checked."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, *arguments, **named):
        found = parse(parser, *arguments, **named)
        if parser.prog == "command":  # else it is one that Hydra or the check uses
            raise Understood
        return found

    def never_run(*arguments, **named):
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(launch.hydra, "main", never_run)


def pages_with(*languages: str) -> list[Path]:
    return [
        path for path in PAGES if path.name not in GENERATED and any(b.language in languages for b in blocks_of(path))
    ]


named = functools.partial(pytest.mark.parametrize, "path", ids=lambda path: path.name)


@named(PAGES)
def test_every_block_says_what_it_is_and_why_it_is_not_run(path):
    for block in blocks_of(path):
        assert block.language in ("python", "sh", "yaml", *SHOWN), f"{block.page}:{block.line}: {block.language!r}"
        assert not block.reason or len(block.reason) > 10


@named(pages_with("python"))
def test_python_runs(path, elsewhere, monkeypatch):
    """In one namespace a page, as a reader would type it; what it is said to print it prints."""
    space, printed = {"__name__": f"page_{path.stem}"}, None
    for block in blocks_of(path):
        if block.really:
            for words in commands_of(block):
                run(words, monkeypatch)
        if printed is not None:
            assert block.text.split() == printed.split(), f"{block.page}:{block.line}"
            printed = None
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + with_stand_ins(block.text), path.name, "exec", dont_inherit=True)
            if not block.reason:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, space)
                printed = out.getvalue() if block.prints else None


def with_stand_ins(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        if name in text:
            text = text.replace(name, hub_stand_in(stand_in))
    return text


def hub_stand_in(name: str) -> str:
    from lora_lightning.tasks import prepare_demo

    return str(prepare_demo(name))


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A training command, in this process: one of its own would spend most of its time on imports."""
    assert words[:2] == ["python", "scripts/train.py"], words
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")  # they would stay configured here
    monkeypatch.setattr(sys, "argv", [*words[1:], *quiet])
    train.main()


@named(pages_with("sh"))
def test_commands_are_understood(path, reading, elsewhere):
    for block in blocks_of(path):
        if block.language == "sh" and not block.reason:
            for words in commands_of(block):
                check(block, words)


def check(block: Block, words: list[str]) -> None:
    """One command of a page."""
    place = f"{block.page}:{block.line}: {' '.join(words)}"
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        words = ["python", *words[at:]]
    program, *rest = words
    if program == "python" and rest[0].startswith("scripts/"):
        assert (ROOT / rest[0]).is_file(), place
        understood(Path(rest[0]).stem.replace("_", "-"), rest[1:], place)
    elif program == "python" and rest[0].startswith("benchmarks/"):
        assert (ROOT / rest[0]).is_file(), place
        flags = re.findall(r"\"(--[\w-]+)\"", "".join(each.read_text() for each in (ROOT / "benchmarks").glob("*.py")))
        assert {word for word in rest if word.startswith("--")} <= set(flags), place
    elif program == "lora-lightning":
        understood(rest[0], rest[1:], place)
    elif program == "lora-train":
        understood("train", rest, place)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), place
    elif program == "pip":
        extras_exist(rest, place)
    else:
        pytest.fail(f"{place}: what is this? If it cannot be checked here, say so: <!-- not run: … -->")


def understood(name: str, arguments: list[str], place: str) -> None:
    """The command's own reading of its arguments finds nothing wrong."""
    if name == "reference":
        return
    assert name in _COMMANDS, place
    assert reads(name, tuple(arguments)) is None, place


@functools.cache
def reads(name: str, arguments: tuple[str, ...]) -> object:
    """None where a command understands its arguments, else what it ended with; each is asked once for all pages."""
    module = importlib.import_module(f"lora_lightning.cli.{name.replace('-', '_')}")
    before, sys.argv = sys.argv, [str(module.__file__), *arguments]
    try:
        module.main(command="command")
    except Understood:
        return None
    except SystemExit as error:
        return f"ended with {error.code}"
    finally:
        sys.argv = before
    return "ran"


def extras_exist(arguments: list[str], place: str) -> None:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    known = set(re.findall(r"^([\w-]+) = \[", table.partition("\n[")[0], re.MULTILINE))
    for found in re.finditer(r"\[([\w,-]+)\]", " ".join(arguments)):
        assert set(found[1].split(",")) <= known, place


@named(pages_with("yaml"))
def test_yaml_is_yaml(path):
    for block in blocks_of(path):
        if block.language == "yaml":
            assert yaml.safe_load(block.text) is not None, f"{block.page}:{block.line}"
