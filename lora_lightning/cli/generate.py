"""Talk to a model with an adapter and without it: ``python scripts/generate.py``, ``lora-lightning generate``.

Light on purpose: a mistake is told, and ``--help`` answers, before torch is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lora_lightning.cli.told import told
from lora_lightning.cli.which_adapter import which_adapter


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Talk with what the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    chosen = vars(_parser(command).parse_args(arguments))
    try:
        with told():
            places = [which_adapter(place) for place in chosen.pop("adapter")]
            from lora_lightning.cli.talk import talk  # torch and transformers: not for --help

            talk(places, **chosen)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell has it


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command,
        description="Talk to a model in the terminal, its answers with the adapter beside those of the base. Where "
        "input is no terminal, each line of it is a conversation of its own, and plain text is written.",
        epilog="In the terminal: /adapter, /base and /both say who answers, /reset begins anew, /help lists the rest. "
        "Ctrl-C ends an answer, /quit or Ctrl-D the program.",
    )
    parser.add_argument(
        "adapter", nargs="+", help="a run's folder, an adapter folder, or owner/name[@revision]; several are compared"
    )
    parser.add_argument("--prompt", action="append", help="answer this and end; may be given several times")
    parser.add_argument("--base", help="name or folder of the base model (default: that of the run)")
    parser.add_argument("--any-base", action="store_true", help="take a base that is not the one of the training")
    parser.add_argument("--system", help="a system message (default: that of each run's data; '': none)")
    parser.add_argument("--raw", action="store_true", help="continue texts as they stand, without a chat template")
    parser.add_argument("--only", choices=("adapter", "base"), help="one side alone answers")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token always")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the base model's repository")
    return parser


if __name__ == "__main__":
    main()
