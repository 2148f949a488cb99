"""Adapters on the Hugging Face Hub: fetched where a folder is asked for, and sent there."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "lora_lightning.json"
OUTSIDE_FILE = "modules_outside.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, OUTSIDE_FILE)
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
_CARD = "README.md"
_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]*[\w-])(@(?P<revision>[\w./-]+))?", re.ASCII)


def adapter_folder(place: str | os.PathLike[str]) -> Path:
    """Where an adapter's files lie on this machine, fetched from the Hub if need be.

    A folder of that name goes first. Else ``owner/name``, or ``owner/name@revision`` (a branch, a tag or a commit), is
    an adapter on the Hub, of which the files that are read here are downloaded once; without a network those that are
    in the Hub's cache are taken (``HF_HUB_OFFLINE=1`` asks for nothing else). Safe to call from several processes.

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
            f"adapter_model.bin, are not read: save it as safetensors with PEFT first). Its files are at {_page(name)}"
        )
    return folder


def id_of(place: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Name and revision, where a text is of the form that the Hub's names have.

    >>> id_of("owner/name@v1.0"), id_of("owner/name"), id_of("./owner/name"), id_of("a/b/c")
    (('owner/name', 'v1.0'), ('owner/name', None), None, None)
    """
    match = _ID.fullmatch(place) if isinstance(place, str) else None
    return None if match is None else (match["name"], match["revision"])


def push_adapter(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    message: str = "Add a LoRA adapter",
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Send an adapter to the Hugging Face Hub, in one commit; the repository is made if need be.

    Sent are the adapter's own files and the tokenizer beside them, never checkpoints or pickles, and a model card where
    neither the folder nor the repository has one.

    Args:
        source: An injected model, or an adapter folder.
        repo_id: ``owner/name``, or ``owner/name@branch``.
        private: Whether a new repository is private; None leaves that to the owner's settings.
        message: Of the commit.
        token: An access token; None takes the one that the machine is logged in with (``HF_TOKEN``, ``hf auth login``).
        create_pr: Open a pull request instead of writing to the branch.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: If there is no adapter, its values are not finite, or the Hub refuses it.
    """
    found = id_of(repo_id)
    if found is None:
        raise AdapterError(f"repo_id must be owner/name, or owner/name@branch, got {repo_id!r}")
    if isinstance(source, (str, os.PathLike)):
        return _push(Path(source), *found, private, message, token, create_pr)
    from lora_lightning.adapters.folder import save_adapter

    with tempfile.TemporaryDirectory() as place:
        return _push(save_adapter(source, place), *found, private, message, token, create_pr)


def _push(
    folder: Path, name: str, branch: str | None, private: bool | None, message: str, token: str | None, create_pr: bool
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    from lora_lightning.adapters.folder import check_folder

    config = check_folder(folder)
    patterns = (*ADAPTER_FILES, *TOKENIZER_FILES, _CARD)
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files if file.is_file()]
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        if not (folder / _CARD).exists() and not api.file_exists(name, _CARD, revision=branch):
            operations.append(CommitOperationAdd(_CARD, _card(name, config).encode()))
        told = api.create_commit(name, operations, commit_message=message, revision=branch, create_pr=create_pr or None)
    except Exception as error:  # as above
        raise AdapterError(f"{folder} was not sent to {name}: {_reason(error, name, branch)}") from error
    return str(told.pr_url if create_pr else told.commit_url)


def _card(name: str, config: dict[str, Any]) -> str:
    """The least that lets the Hub show an adapter beside its base model."""
    base = config.get("base_model_name_or_path")
    known = base if base and not os.path.exists(base) and id_of(base) else None
    head = [f"base_model: {known}"] if known else []
    head += ["library_name: peft", "tags:", "- lora", "- lora-lightning"]
    lines = "\n".join(head)
    over = f" over [{known}](https://huggingface.co/{known})" if known else ""
    return f"---\n{lines}\n---\n\n# {name.partition('/')[2]}\n\nA LoRA adapter{over}, rank {config.get('r')}.\n"


def _explained(place: str, name: str, revision: str | None, error: Exception) -> str:
    return f"there is no folder {Path(place).absolute()}, and from the Hub it cannot be had: " + _reason(
        error, name, revision
    )


def _reason(error: BaseException, name: str, revision: str | None) -> str:
    """What the Hub says, put so that one knows what to do."""
    from huggingface_hub import errors as hub

    page = _page(name)
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


def _page(name: str) -> str:
    return f"https://huggingface.co/{name}"
