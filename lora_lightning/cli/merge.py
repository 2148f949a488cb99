"""A whole model from an adapter and its base: a folder for all that knows no adapters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.told import told
from lora_lightning.cli.which_adapter import which_adapter

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TEXT = "The minister has won the second game, and every student wrote about it."


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Merge what the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="Fold an adapter into its base model and write the whole as a folder, tokenizer and generation "
        "config with it, which transformers' from_pretrained loads. How far its outputs are from those of the base "
        "with the adapter beside it is told.",
    )
    parser.add_argument("adapter", help="an adapter folder, a run's folder, or owner/name[@revision] on the Hub")
    parser.add_argument("folder", type=Path, help="where the model goes; it must not be there yet")
    parser.add_argument("--base", help="name or folder of the base model (default: what the adapter says)")
    parser.add_argument("--dtype", default="auto", choices=_DTYPES, help="of the weights (default: the base's own)")
    parser.add_argument("--exact", action="store_true", help="make every sum in float64")
    parser.add_argument("--untie", action="store_true", help="give an adapted embedding and its tied head a copy each")
    parser.add_argument("--any-base", action="store_true", help="take a base that is not the one of the training")
    parser.add_argument("--text", default=_TEXT, help="what the outputs are compared on")
    parser.add_argument("--max-shard-size", default="5GB", help="of the files of weights (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the base model's repository")
    chosen = vars(parser.parse_args(arguments))
    with told():
        chosen["adapter"] = which_adapter(chosen["adapter"]).adapter
        from lora_lightning.cli.merged import merge_into_folder  # torch and transformers: not for --help

        report = merge_into_folder(**chosen)
    print(report)
    print(chosen["folder"])


if __name__ == "__main__":
    main()
