"""What a sweep says, made from its folder alone: ``python scripts/sweep_report.py <folder>``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_lightning.cli.told import told
from lora_lightning.reports.page import try_sweep_page
from lora_lightning.sweeps.report import as_data, as_table, collect, write


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Report on the sweep that the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="Write sweep.csv, sweep.md, report.html, plots/ and best/ (the best job's adapter) into a sweep's "
        "folder, from what its jobs have left there, and print the table. It can be made again at any time.",
    )
    parser.add_argument("folder", type=Path, help="the folder of a --multirun: outputs/<name>/sweep_<date and time>")
    parser.add_argument("--metric", help="a number of result.json to compare jobs by (default: the sweep's own)")
    parser.add_argument("--mode", choices=("min", "max"), help="which end of it is good (default: the sweep's own)")
    chosen = parser.parse_args(arguments)
    with told():
        report(chosen.folder, metric=chosen.metric, mode=chosen.mode)


def report(folder: Path, *, metric: str | None = None, mode: str | None = None, console: Console | None = None) -> Path:
    """Write a sweep's report and its page, ``report.html``, and print its table.

    Args:
        folder: The sweep's folder.
        metric: What to compare jobs by; None: what the sweep says.
        mode: ``min`` or ``max``; None: what the sweep says.
        console: Where to print; None: to stdout.

    Returns:
        The path of ``sweep.md``.

    Raises:
        LoraConfigError: As `write_report` does.
    """
    console = console or Console()
    sweep = collect(folder, metric=metric, mode=mode)
    path = write(sweep)
    console.print(as_table(sweep))
    console.print(f"Report: {path}", soft_wrap=True)
    if (page := try_sweep_page(sweep.folder, as_data(sweep))) is not None:
        console.print(f"One page of it: {page}", soft_wrap=True)
    return path


if __name__ == "__main__":
    main()
