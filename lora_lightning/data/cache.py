"""Tokenised rows on disk: made once, by whichever process comes first, and memory-mapped by all.

A folder holds the rows of one fingerprint: of the tokenizer, the chat template, the content of the files, the options
and the code that encodes. Whatever changes, another folder is made; nothing is ever changed in one. It is written aside
and renamed when it is whole, and its files are checked against their sizes and checksums when it is opened.

Files are known by their content and not by size and time of change, which lie where a file is written again within a
second or unpacked with its old times. Reading a file through costs little beside tokenising it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.checksum import crc32, pieces, sha256
from lora_lightning.data.encode import Tally
from lora_lightning.data.flat import FlatRows
from lora_lightning.data.loaded import Loaded, SamplePrompt
from lora_lightning.data.loaders import Rows
from lora_lightning.errors import LoraConfigError

if TYPE_CHECKING:
    from lora_lightning.data.module import DataModule

FORMAT = 1
"""Of the folders; another number, other fingerprints."""
PARTS = ("train", "validation")
NOT_OF_ROWS = {
    *("batch_size", "val_batch_size", "num_workers", "group_by_length", "pad_to_multiple_of", "packing"),
    *("cache", "tokenizer"),
}
"""Options that change how rows are dealt out, and not what they are."""
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def cache_folder(cache: bool | str) -> Path:
    """Where tokenised rows are kept: ``$XDG_CACHE_HOME`` (else ``~/.cache``)``/lora_lightning/data``, or as given."""
    if isinstance(cache, str):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_lightning" / "data"


def load_cached(module: DataModule, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """A data module's rows from its cache, where they are put first if they are not there.

    Safe to call from several processes and jobs at once: one does the work, the others wait.

    Args:
        module: Says what its rows are made of, and makes them.
        tokenizer: With which they are tokenised.

    Raises:
        LoraConfigError: If the folder cannot be written to, or the rows are none to be cached.
    """
    place = place_of(module, tokenizer)
    return kept(place.parent, place.name, lambda: module.load(tokenizer))


def place_of(module: DataModule, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of a data module's rows, whether they are there or not."""
    return cache_folder(module.cache) / fingerprint(module, tokenizer)


def kept(cache: Path, key: str, make: Callable[[], Loaded]) -> Loaded:
    """What lies in a cache under a key, or what is made and put there."""
    folder = cache / key
    if (loaded := _read(folder)) is not None:
        rank_zero_info(f"Tokenised rows are read from {folder}.")
        return loaded
    lock = FileLock(cache / f"{key}.lock")
    with _explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if (loaded := _read(folder)) is not None:  # another process was first
            return loaded
        made = make()
        with _explained(cache):
            _write(folder, made)
    finally:
        lock.release()
    rank_zero_info(f"Tokenised rows are kept in {folder}.")
    return _opened(folder)


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoraConfigError(
            f"Tokenised rows cannot be kept in {cache} ({error}): give a folder that can be written to, "
            "data.cache=…, or data.cache=false."
        ) from error


def fingerprint(module: DataModule, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a data module's rows are made of, in 40 signs.

    Args:
        module: The data module; its tokenizer gets the chat template of the module.
        tokenizer: With which rows are tokenised.

    Raises:
        LoraConfigError: If the module cannot say what its rows are made of.
    """
    module.prepare_tokenizer(tokenizer)
    made_of = {
        "format": FORMAT,
        "code": _code(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "tokenizer": _tokenizer(tokenizer),
        "template": _template(tokenizer),
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "options": _options(module),
        "content": module.content(),
    }
    return sha256([json.dumps(made_of, sort_keys=True).encode()])[:40]


def _code() -> dict[str, str]:
    """This package's own, by its text: its version stays the same while somebody works on it."""
    return {path.name: sha256(pieces(path)) for path in sorted(Path(__file__).parent.glob("*.py"))}


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary, merges, added tokens, normaliser and the rest, without the padding and cutting of its last call."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    inner = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
    return {
        "class": type(tokenizer).__qualname__,
        "content": sha256([json.dumps(inner, sort_keys=True).encode()]),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }


def _template(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    template = tokenizer.chat_template
    return [template, str(date.today())] if "strftime_now" in str(template) else [template]


def _options(module: DataModule) -> dict[str, Any]:
    """All options but those known to be none of the rows', so that a new one is not forgotten."""
    ignored = {*vars(LightningDataModule()), *NOT_OF_ROWS}
    given = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in ignored}
    try:
        return json.loads(json.dumps(given))
    except TypeError as error:
        raise LoraConfigError(
            f"{type(module).__name__} has an option that is no number, text, or list of them ({error}), so it cannot "
            f"be told whether tokenised rows are still the same: set data.cache=false."
        ) from error


def _write(folder: Path, loaded: Loaded) -> None:
    """Write a folder aside and put it in its place, under the lock."""
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        new = Path(aside) / folder.name
        about = _save(new, loaded)
        text = json.dumps(about)
        (new / "about.json").write_text(json.dumps({"about": text, "crc32": crc32([text.encode()])}))
        if folder.exists():  # damaged; whoever has it mapped keeps it
            folder.rename(Path(aside) / "damaged")
        new.rename(folder)


def _save(folder: Path, loaded: Loaded) -> dict[str, Any]:
    if not isinstance(loaded.train, Rows):
        raise LoraConfigError("A stream is read while training, and its tokenised rows are not kept: data.cache=false.")
    return {
        "train": FlatRows.of(loaded.train.examples).save(folder / "train"),
        "validation": FlatRows.of(loaded.validation.examples).save(folder / "validation"),
        "tallies": {part: vars(tally) for part, tally in loaded.tallies.items()},
        "notes": loaded.notes,
        "prompts": [asdict(prompt) for prompt in loaded.prompts],
    }


def _read(folder: Path) -> Loaded | None:
    """The content of a folder; None where there is none, or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        return _opened(folder)
    except _DAMAGE as error:
        rank_zero_info(f"Tokenised rows in {folder} are damaged ({error}), and are made again.")
        return None


def _opened(folder: Path) -> Loaded:
    written = json.loads((folder / "about.json").read_text())
    if crc32([written["about"].encode()]) != written["crc32"]:
        raise ValueError("the content of about.json is not what was written")
    about: Mapping[str, Any] = json.loads(written["about"])
    train, validation = (FlatRows.load(folder / part, about[part]) for part in PARTS)
    return Loaded(
        train=Rows(train),
        validation=Rows(validation),
        shown=train[0],
        tallies={part: _tally(fields) for part, fields in about["tallies"].items()},
        notes=about["notes"],
        prompts=[SamplePrompt(**prompt) for prompt in about["prompts"]],
    )


def _tally(fields: Mapping[str, Any]) -> Tally:
    return Tally(**{**fields, "formats": Counter(fields["formats"])})
