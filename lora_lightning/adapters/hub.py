"""Adapters on the Hugging Face Hub, fetched where a folder is asked for."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from lora_lightning.adapters.facts import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from lora_lightning.errors import AdapterError

# What save_pretrained writes of a tokenizer, whichever kind it is.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab*",
    "merges.txt",
    "*.model",
)
_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]*[\w-])(@(?P<revision>[\w./-]+))?", re.ASCII)


def adapter_folder(place: str | os.PathLike[str]) -> Path:
    """Where an adapter's files lie on this machine, fetched from the Hub if need be.

    A folder of that name goes first. Else ``owner/name``, or ``owner/name@revision`` (a branch, a tag or a commit), is
    an adapter on the Hub, of which the files that are read here are downloaded once; without a network those that are
    in the Hub's cache are taken (``HF_HUB_OFFLINE=1`` asks for nothing else). Safe to call from several processes.

    Args:
        place: A folder, or a name on the Hub.

    Raises:
        AdapterError: If it is on the Hub's terms a name, and cannot be had.
    """
    if os.path.exists(place) or (found := id_of(place)) is None:
        return Path(place)
    from huggingface_hub import snapshot_download

    name, revision = found
    wanted = [*ADAPTER_FILES, *TOKENIZER_FILES, "additional_chat_templates/*"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of the Hub's client, and of what it speaks HTTP with
        raise AdapterError(_explained(str(place), name, revision, error)) from error
    if absent := [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]:
        raise AdapterError(
            f"{place} on the Hub is no adapter that can be read here: it has no {' and no '.join(absent)} (pickles, "
            f"adapter_model.bin, are not read: save it as safetensors with PEFT first). Its files: {page_of(name)}"
        )
    return folder


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy a tokenizer's files, its chat template among them, from one folder to another.

    Args:
        source: The folder that may have a tokenizer.
        folder: Where to; files of those names are written over.

    Returns:
        What was copied; nothing where ``source`` has no tokenizer.
    """
    if not (source / "tokenizer_config.json").is_file():
        return []
    found = sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, folder / path.name)
    return [path.name for path in found]


def id_of(place: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Name and revision, where a text is of the form that the Hub's names have.

    >>> id_of("owner/name@v1.0"), id_of("owner/name"), id_of("./owner/name"), id_of("a/b/c")
    (('owner/name', 'v1.0'), ('owner/name', None), None, None)
    """
    match = _ID.fullmatch(place) if isinstance(place, str) else None
    return None if match is None else (match["name"], match["revision"])


def on_the_hub(name: str) -> bool:
    """Whether others find a model of this name on the Hub: ``owner/name`` or one word, and no folder of this machine.

    >>> on_the_hub("owner/name"), on_the_hub("gpt2"), on_the_hub("demo:tiny-llama"), on_the_hub("/models/base")
    (True, True, False, False)
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        return not os.path.exists(name)  # which goes first, as in transformers' from_pretrained
    return False


def _explained(place: str, name: str, revision: str | None, error: Exception) -> str:
    return f"there is no folder {Path(place).absolute()}, and from the Hub it cannot be had: " + reason_of(
        error, name, revision
    )


def reason_of(error: BaseException, name: str, revision: str | None) -> str:
    """What the Hub says, put so that one knows what to do."""
    from huggingface_hub import errors as hub

    page = page_of(name)
    if isinstance(error, hub.GatedRepoError):
        return f"{name} is gated: accept its terms at {page}, and set the environment variable HF_TOKEN"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; its branches and tags are at {page}/tree/main"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"there is no {page}, or it is private: set the environment variable HF_TOKEN to a token that may use it"
    if isinstance(error, hub.LocalEntryNotFoundError):
        what = f"revision {revision!r} of {name}" if revision else name
        return f"{what} is not in the Hub's cache on this machine, and {page} cannot be reached (offline?)"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the token that was used (HF_TOKEN, or `hf auth login`) may not do that with {page}"
    return str(error) or type(error).__name__


def page_of(name: str) -> str:
    """Where people look at a repository."""
    return f"https://huggingface.co/{name}"
