"""The work of ``export``: the adapter in the form that was asked for, its card, and the way to the Hub."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lora_lightning.adapters import adapter_folder, push_adapter, read_record, write_gguf
from lora_lightning.adapters.export import export_folder
from lora_lightning.adapters.folder import check_folder
from lora_lightning.adapters.hub import id_of, on_the_hub
from lora_lightning.adapters.written import new_folder, refuse_existing
from lora_lightning.cli.adapted import base_of
from lora_lightning.cli.which_adapter import origin_of
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.reports.card import Subject, write_card
from lora_lightning.tasks.demo import original_of
from lora_lightning.tasks.hub_errors import explained
from lora_lightning.tasks.model import source_of
from lora_lightning.tasks.model_config import ModelConfig

_GGUF = "adapter.gguf"


def export(
    adapter: str,
    folder: Path,
    *,
    form: str = "peft",
    base: str | None = None,
    run: Path | None = None,
    hub: str | None = None,
    private: bool = False,
    pull_request: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write an adapter and its card, whole or not at all, and send it to the Hub where that is asked for.

    Args:
        adapter: An adapter folder, or one on the Hub.
        folder: Where it goes.
        form: ``peft``, ``vllm`` or ``gguf``.
        base: Another name of the base model than the adapter's.
        run: The folder of the run that trained it, for the card.
        hub: ``owner/name[@branch]``.
        private: Whether a repository that has to be made is private.
        pull_request: Open one instead of writing to the branch.
        trust_remote_code: Allow code from the base model's repository to run.

    Raises:
        LoraConfigError: ``hub`` is no name, or the base model's config cannot be had.
        AdapterError: The adapter is damaged or cannot have that form, ``folder`` is there already, or the Hub refuses.
    """
    refuse_existing(folder)
    if hub is not None and id_of(hub) is None:
        raise LoraConfigError(f"--hub is owner/name, or owner/name@branch, got {hub!r}")
    if hub is not None and form == "gguf":
        raise LoraConfigError("--hub sends an adapter folder: leave --gguf out, or send the file with `hf upload`")
    place = adapter_folder(adapter)
    config = check_folder(place)
    _refuse_chain(place, form)
    with new_folder(folder) as aside:
        if form == "gguf":
            model = base_of(adapter, config, base, trust_remote_code=trust_remote_code)
            print(write_gguf(place, aside / _GGUF, _config_of(model), name=folder.name, base_name=base))
        else:
            export_folder(place, aside, fold_scaling=form == "vllm", base=base)
        subject = Subject(
            adapter=place if form == "gguf" else aside,
            repo=(hub or folder.name).partition("@")[0],
            run=run,
            origin=origin_of(place),
            base=base,
            form=form,
            file=_GGUF,
        )
        write_card(subject, aside)
    _say_where_base_is(base or config.get("base_model_name_or_path"), form)
    if hub is not None:
        print(_sent(folder, hub, {"private": private or None, "create_pr": pull_request}))


def _sent(folder: Path, hub: str, how: Mapping[str, Any]) -> str:
    try:
        return push_adapter(folder, hub, **how)
    except AdapterError as error:
        given = "".join(f", {name}={value}" for name, value in how.items() if value)
        call = f"from lora_lightning import push_adapter; push_adapter({str(folder)!r}, {hub!r}{given})"
        raise AdapterError(
            f"{error}. The folder is whole, and this sends it:\npython -c {shlex.quote(call)}"
        ) from error


def _refuse_chain(place: Path, form: str) -> None:
    """Servers put an adapter over the base as everybody has it, and not over one with others folded in."""
    chain = read_record(place).get("bases")
    if not chain:
        return
    message = f"{place} was trained over a base with {', '.join(chain)} folded in, and is nothing without that"
    if form != "peft":
        raise AdapterError(f"{message}. Write the whole model instead: lora-lightning merge {place} <folder>")
    print(f"{message}: the card says so, and whoever loads it needs those too", file=sys.stderr)


def _config_of(model: ModelConfig) -> dict[str, Any]:
    with explained(model):
        return AutoConfig.from_pretrained(**source_of(model)).to_dict()


def _say_where_base_is(base: str | None, form: str) -> None:
    """Others cannot have a base that lies on this machine."""
    if form != "gguf" and base and not on_the_hub(base):
        told = original_of(base) or "owner/name"
        print(
            f"The adapter names {base} as its base, which others cannot have: --base {told} writes another name",
            file=sys.stderr,
        )
