"""An adapter folder from a training checkpoint, without the base model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.told import told


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Make the folder that the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command, description="Make an adapter folder, which PEFT loads, from a checkpoint; the base is not needed."
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file of a run with LoRA")
    parser.add_argument("folder", type=Path, nargs="?", help="where (default: <checkpoint>-adapter beside it)")
    parser.add_argument("--name", default="default", help="which adapter, where the run had several")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder or chosen.checkpoint.with_name(f"{chosen.checkpoint.stem}-adapter")
    with told():
        from lora_lightning.adapters import adapter_from_checkpoint  # torch: not for --help

        print(adapter_from_checkpoint(chosen.checkpoint, folder, name=chosen.name))


if __name__ == "__main__":
    main()
