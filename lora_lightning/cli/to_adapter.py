"""An adapter folder from a training checkpoint, without the base model."""

from __future__ import annotations

import argparse
import sys
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
        prog=command,
        description="Make an adapter folder, which PEFT loads, from a checkpoint; the base is not needed. The "
        "tokenizer is that of the adapter folder which the run wrote, where there is one.",
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file of a run with LoRA")
    parser.add_argument("folder", type=Path, nargs="?", help="where (default: <checkpoint>-adapter beside it)")
    parser.add_argument("--name", default="default", help="which adapter, where the run had several")
    parser.add_argument("--fold-scaling", action="store_true", help="one scale for all layers, as vLLM wants it")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder or chosen.checkpoint.with_name(f"{chosen.checkpoint.stem}-adapter")
    with told():
        from lora_lightning.adapters import adapter_from_checkpoint  # torch: not for --help
        from lora_lightning.adapters.hub import copy_tokenizer

        made = adapter_from_checkpoint(chosen.checkpoint, folder, name=chosen.name, fold_scaling=chosen.fold_scaling)
    saved = adapter_of_run(chosen.checkpoint, chosen.name)
    if not copy_tokenizer(saved, made):
        print(
            f"{made} has no tokenizer, since a checkpoint holds none and there is none in {saved}: whoever reads it "
            "takes the base model's, whose chat template and special tokens may be others than those of training",
            file=sys.stderr,
        )
    print(made)


def adapter_of_run(checkpoint: Path, name: str = "default") -> Path:
    """Where the run that wrote ``checkpoints/NAME.ckpt`` leaves its adapter when it ends; it need not be there."""
    folder = checkpoint.absolute().parent.parent / "adapter"
    return folder if name == "default" else folder / name


if __name__ == "__main__":
    main()
