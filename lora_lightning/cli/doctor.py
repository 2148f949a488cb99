"""Look whether this machine can train: ``python scripts/doctor.py``, ``lora-lightning doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from lora_lightning.cli.told import told
from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.reports.doctor import CHECKS, Check, Finding, examine

_SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "bold red")}


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Make the checks and leave with status 1 where one has failed.

    Args:
        arguments: The command line; None is that of this process.
        command: How the program is called, for its help.
    """
    checks = {check.name: check for check in (*CHECKS, Check("hydra", hydra_plugin, 30))}
    parser = argparse.ArgumentParser(
        prog=command,
        description="Look whether this machine can train, in about half a minute: a line for each check, with what to "
        "do where something is wrong. Nothing is changed, and no token is shown.",
        epilog=f"Checks: {', '.join(checks)}",
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of findings")
    parser.add_argument("--only", action="append", metavar="CHECK", help="this check; may be given several times")
    chosen = parser.parse_args(arguments)
    with told():
        wanted = _wanted(checks, chosen.only)
    findings = {}
    for check in wanted:
        findings[check.name] = examine(check)
        if not chosen.json:
            _show(check.name, findings[check.name], max(map(len, checks)))
    if chosen.json:
        print(json.dumps([{"check": name, **asdict(finding)} for name, finding in findings.items()], indent=2))
    sys.stdout.flush()
    status = int(any(finding.status == "failure" for finding in findings.values()))
    if any(finding.text.startswith("no answer") for finding in findings.values()):
        os._exit(status)  # what hangs is not waited for
    raise SystemExit(status)


def hydra_plugin() -> Finding:
    """Whether Hydra finds what this package adds to it: the ``lora`` group in every app, launchers for sweeps."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    found = [plugin.__name__ for plugin in Plugins.instance().discover() if "lora_lightning" in plugin.__module__]
    if not found:
        return Finding(
            "failure",
            "Hydra does not find the plugins of this package",
            "install it again (pip install lora-lightning); a package hydra_plugins with an __init__.py hides others",
        )
    GlobalHydra.instance().clear()
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        settings = len(compose("train"))
    return Finding("ok", f"{', '.join(sorted(found))}; train.yaml composes ({settings} groups and keys)")


def _wanted(checks: dict[str, Check], only: Sequence[str] | None) -> list[Check]:
    if unknown := [name for name in only or () if name not in checks]:
        raise LoraConfigError(
            f"There is no check {unknown[0]!r}{did_you_mean(unknown[0], checks)}. There are: {', '.join(checks)}"
        )
    return [check for name, check in checks.items() if only is None or name in only]


def _show(name: str, finding: Finding, width: int) -> None:
    sign, style = _SIGNS[finding.status]
    console = Console()
    console.print(
        Text(f"{sign} ", style=style) + Text(f"{name:<{width}}  {finding.text}", style="not bold"), soft_wrap=True
    )
    if finding.remedy:
        console.print(Text(f"  {'':<{width}}  → {finding.remedy}", style="dim"), soft_wrap=True)


if __name__ == "__main__":
    main()
