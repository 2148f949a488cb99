"""An adapter for others, from the command line: ``python scripts/export.py``, ``lora-lightning export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.told import told
from lora_lightning.cli.which_adapter import run_named, which_adapter


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Export what the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="Write a trained adapter as a folder for others: in PEFT's format, for vLLM, or as a GGUF file for "
        "llama.cpp, with a model card made from the run that trained it. With --hub the folder is sent to the Hub too.",
    )
    parser.add_argument("adapter", help="an adapter folder, a run's folder, or owner/name[@revision] on the Hub")
    parser.add_argument("folder", type=Path, help="where it goes; it must not be there yet")
    forms = parser.add_mutually_exclusive_group()
    for form, text in (
        ("peft", "an adapter folder that PEFT, transformers and load_adapter read (the default)"),
        ("vllm", "the same with one rank and one scale for all layers, which vLLM needs"),
        ("gguf", "adapter.gguf for llama.cpp, which is given it beside the base's own GGUF file"),
    ):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=text)
    parser.set_defaults(form="peft")
    parser.add_argument("--base", help="what the base model is called (default: what the adapter says)")
    parser.add_argument("--run", type=Path, help="the run's folder, for the card (default: the one that it lies in)")
    parser.add_argument("--hub", metavar="OWNER/NAME", help="send it there as well; OWNER/NAME@BRANCH for a branch")
    parser.add_argument("--private", action="store_true", help="a repository that is made for it is private")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request instead of writing there")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the base model's repository")
    chosen = parser.parse_args(arguments)
    with told():
        adapter, run = which_adapter(chosen.adapter)
        run = run_named(chosen.run) if chosen.run else run
        from lora_lightning.cli.exported import export  # torch: not for --help

        export(
            adapter,
            chosen.folder,
            form=chosen.form,
            base=chosen.base,
            run=run,
            hub=chosen.hub,
            private=chosen.private,
            pull_request=chosen.pull_request,
            trust_remote_code=chosen.trust_remote_code,
        )
    print(chosen.folder)


if __name__ == "__main__":
    main()
