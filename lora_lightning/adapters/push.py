"""Adapters sent to the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.adapters.facts import ADAPTER_FILES
from lora_lightning.adapters.folder import check_folder, save_adapter
from lora_lightning.adapters.hub import TOKENIZER_FILES, id_of, on_the_hub, reason_of
from lora_lightning.errors import AdapterError

_CARD = "README.md"
_PICTURE = re.compile(r"!\[[^]]*\]\(([\w. -]+\.(?:png|jpg|svg))\)")  # of the same folder


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

    Sent are the adapter's own files, the tokenizer and the model card beside them (``README.md``, and pictures that it
    shows), never checkpoints or pickles; a short card is made where neither the folder nor the repository has one. Of
    the adapter that was there before nothing stays: its files that this one does not have are deleted in the same
    commit.

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
    with tempfile.TemporaryDirectory() as place:
        return _push(save_adapter(source, place), *found, private, message, token, create_pr)


def _push(
    folder: Path, name: str, branch: str | None, private: bool | None, message: str, token: str | None, create_pr: bool
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    config = check_folder(folder)
    patterns = (*ADAPTER_FILES, *TOKENIZER_FILES, _CARD)
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)} | _shown(folder))
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files if file.is_file()
    ]
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        there = api.list_repo_files(name, revision=branch)
        left = [file for file in ADAPTER_FILES if file in there and not (folder / file).exists()]
        operations += [CommitOperationDelete(file) for file in left]
        if not (folder / _CARD).exists() and _CARD not in there:
            operations.append(CommitOperationAdd(_CARD, _card(name, config).encode()))
        told = api.create_commit(name, operations, commit_message=message, revision=branch, create_pr=create_pr or None)
    except Exception as error:  # as above
        raise AdapterError(f"{folder} was not sent to {name}: {reason_of(error, name, branch)}") from error
    return str(told.pr_url if create_pr else told.commit_url)


def _shown(folder: Path) -> set[Path]:
    """The pictures in a folder that its card shows."""
    card = folder / _CARD
    names = _PICTURE.findall(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    return {folder / name for name in names if (folder / name).is_file()}


def _card(name: str, config: dict[str, Any]) -> str:
    """The least that lets the Hub show an adapter beside its base model."""
    base = config.get("base_model_name_or_path")
    known = base if base and on_the_hub(base) else None
    head = [f"base_model: {known}"] if known else []
    head += ["library_name: peft", "tags:", "- lora", "- lora-lightning"]
    lines = "\n".join(head)
    over = f" over [{known}](https://huggingface.co/{known})" if known else ""
    return f"---\n{lines}\n---\n\n# {name.partition('/')[2]}\n\nA LoRA adapter{over}, rank {config.get('r')}.\n"
