"""A trained adapter at a lower rank, from the command line: ``python scripts/resize.py``, ``lora-lightning resize``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.told import told
from lora_lightning.cli.which_adapter import run_named, which_adapter
from lora_lightning.errors import LoraConfigError


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Resize what the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        usage="%(prog)s [options] ADAPTER [FOLDER] r=8 [energy=0.99]",
        description="Cut each layer's update to the best one of a lower rank (truncated SVD) and write it as a new "
        "adapter, at the same scale. How much of the update is kept is told, and where the run's folder says what data "
        "it had, the validation loss before and after.",
    )
    parser.add_argument("adapter", help="an adapter folder, a run's folder, or owner/name[@revision] on the Hub")
    parser.add_argument("folder", type=Path, nargs="?", help="where to (default: beside it, its name and -r8)")
    parser.add_argument("--r", type=_whole, metavar="R", help="the new rank; r=8 means the same")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="of the update that each layer keeps, at the rank that takes"
    )
    parser.add_argument("--run", type=Path, help="a run's folder, for its data (default: the one the adapter lies in)")
    parser.add_argument("--base", help="name or folder of the base model to measure over (default: the run's)")
    parser.add_argument("--no-loss", action="store_true", help="measure nothing: the base model is not needed then")
    parser.add_argument("--layers", action="store_true", help="tell of each layer, not of each kind")
    chosen = parser.parse_args([_as_option(each) for each in (sys.argv[1:] if arguments is None else arguments)])
    with told():
        adapter, run = which_adapter(chosen.adapter)
        run = run_named(chosen.run) if chosen.run else run
        if chosen.base and run is None:
            raise LoraConfigError("--base is to measure the loss over, on the data of a run: name that with --run")
        folder = chosen.folder or _beside(adapter, chosen.r, chosen.energy)
        from lora_lightning.cli.resized import resize_and_tell  # torch: not for --help

        resize_and_tell(
            adapter,
            folder,
            chosen.r,
            chosen.energy,
            run=None if chosen.no_loss else run,
            base=chosen.base,
            each_layer=chosen.layers,
        )
    print(folder)


def _as_option(argument: str) -> str:
    """``r=8`` as ``--r=8``, as the other commands have settings."""
    name, equals, _ = argument.partition("=")
    return f"--{argument}" if equals and name in ("r", "energy", "run", "base") else argument


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the rank is a whole number, got {text!r}") from None


def _beside(adapter: str, r: int | None, energy: float | None) -> Path:
    if not Path(adapter).exists():
        raise LoraConfigError(f"name the folder that the resized adapter goes to: {adapter} is not on this machine")
    parts = [f"r{r}" if r is not None else "", f"e{energy:g}" if energy is not None else ""]
    return Path(f"{os.path.abspath(adapter)}-{'-'.join(filter(None, parts)) or 'resized'}")


if __name__ == "__main__":
    main()
