"""The console commands of the installed package: ``lora-lightning <command> …`` and ``lora-train …``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from lora_lightning.errors import did_you_mean

_COMMANDS = {
    "train": "train an adapter; settings in Hydra's way, as in lora.r=64 (`lora-train` for short)",
    "plan": "what a training would adapt, weigh and take, before it runs; --compare lora=a,b side by side",
    "prepare": "have model, data set and tokenised rows on this machine, for training without a network",
    "generate": "talk to a model, with the adapter and without: <run or adapter folder> [--prompt TEXT]",
    "eval": "measure an adapter beside its base model: adapter=<run or adapter folder> or ckpt_path=<file>",
    "to-adapter": "make an adapter folder from a checkpoint: <file> [<folder>]",
    "merge": "write a whole model from an adapter and its base: <adapter> <folder> [--base NAME]",
    "export": "write an adapter for others, with a model card: <adapter> <folder> [--vllm|--gguf] [--hub OWNER/NAME]",
    "resize": "cut an adapter to the best one of a lower rank: <adapter> [<folder>] r=8",
    "report": "write report.html, one page of a run or a sweep: <folder> [--open]",
    "sweep-report": "write and print what a sweep says: <folder> [--metric NAME] [--mode min|max]",
    "doctor": "look whether this machine can train: versions, devices, processes, a tiny training [--json]",
}


def main() -> None:
    """Run the command that the first argument names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        from lora_lightning import __version__

        print(f"lora-lightning {__version__}")
    elif name in _COMMANDS:
        _run(name, rest, f"lora-lightning {name}")
    else:
        print(f"There is no command {name!r}{did_you_mean(name, _COMMANDS)}.\n\n{_help()}", file=sys.stderr)
        raise SystemExit(2)


def train() -> None:
    """Run ``lora-lightning train``."""
    _run("train", sys.argv[1:], "lora-train")


def _run(name: str, arguments: list[str], command: str) -> None:
    module = importlib.import_module(f"lora_lightning.cli.{name.replace('-', '_')}")
    # Lightning starts the other processes of a DDP run with this argv: it has to name a file that takes the same
    # arguments, which the console script with its sub-commands is not.
    sys.argv = [str(Path(str(module.__file__)).resolve()), *arguments]
    module.main(command=command)


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items())
    return (
        f"usage: lora-lightning <command> …\n\n{lines}\n\n"
        "`lora-lightning train --help` shows all settings, `--cfg job` what a command would use."
    )
