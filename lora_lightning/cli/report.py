"""The page of a run or a sweep, made again from its folder alone: ``python scripts/report.py <folder>``."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.told import told


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Make the page that the command line names.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="Write report.html, one page that needs no network, into the folder of a run or of a sweep, from "
        "what it holds. It can be made again at any time, while the run goes on too; a sweep has its tables and "
        "pictures made anew.",
    )
    parser.add_argument("folder", type=Path, help="outputs/<name>/<date and time>, or that of a --multirun")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    chosen = parser.parse_args(arguments)
    with told():
        page = page_of(chosen.folder)
    print(page)
    if chosen.open:
        webbrowser.open(page.absolute().as_uri())


def page_of(folder: Path) -> Path:
    """Write the page of a run or a sweep.

    Args:
        folder: Of either.

    Returns:
        The path of ``report.html``.

    Raises:
        LoraConfigError: It is neither; with what is there.
        AdapterError: There is a ``report.html`` that is not ours.
    """
    from lora_lightning.reports.page import is_run, neither, run_page

    if is_run(folder):
        return run_page(folder)
    if not looks_like_a_sweep(folder):
        raise neither(folder)
    from lora_lightning.reports.page import sweep_page
    from lora_lightning.sweeps.report import as_data, collect, write

    sweep = collect(folder)
    write(sweep)
    return sweep_page(sweep.folder, as_data(sweep))


def looks_like_a_sweep(folder: Path) -> bool:
    """Whether a folder has a sweep's ``sweep.json``, or jobs that Hydra has started and that left results."""
    jobs = (path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml"))
    numbered = (job for job in jobs if job.name.isdecimal() or (folder / "multirun.yaml").is_file())
    return (folder / "sweep.json").is_file() or any((job / "result.json").is_file() for job in numbered)


if __name__ == "__main__":
    main()
