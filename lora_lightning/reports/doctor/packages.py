"""Versions: of Python, of what the package needs, of what it can use, and which are known to be bad."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

from lora_lightning.reports.doctor.check import Finding

_OURS = "lora-lightning"
_TOLD = ("torch", "lightning", "transformers", "hydra-core")
_BAD = {
    "lightning": (
        ("2.6.2", "2.6.3"),
        "these releases were compromised: pip install 'lightning>=2.5,!=2.6.2,!=2.6.3', and change every password "
        "and token that this machine has seen since",
    )
}
"""Versions that are worse than too old, and what to do."""


def python() -> Finding:
    """Python's version and the system under it."""
    return Finding("ok", f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})")


def packages() -> Finding:
    """What the package cannot do without, in versions that fit."""
    for name, (bad, remedy) in _BAD.items():
        if (there := installed(name)) in bad:
            return Finding("failure", f"{name} {there}", remedy)
    try:
        needed = list(needs())
    except PackageNotFoundError:
        return Finding("failure", f"{_OURS} is not installed here", "pip install lora-lightning, or `make setup`")
    wrong = [need for need in needed if not fits(need)]
    text = ", ".join(f"{name} {installed(name) or '(none)'}" for name in _TOLD)
    if wrong:
        listed = ", ".join(f"{need.name} {installed(need.name) or 'is missing'} ({need.specifier})" for need in wrong)
        return Finding("failure", f"{text}; does not fit: {listed}", "pip install --upgrade lora-lightning")
    return Finding("ok", text)


def extras() -> Finding:
    """What the package can use where it is installed: trackers, searches, formats."""
    try:
        names = [
            name for name in metadata(_OURS).get_all("Provides-Extra") or () if name not in ("dev", "docs", "test")
        ]
    except PackageNotFoundError:
        return Finding("failure", f"{_OURS} is not installed here", "pip install lora-lightning, or `make setup`")
    missing = [name for name in names if not all(map(fits, needs(name)))]
    there = ", ".join(name for name in names if name not in missing) or "none"
    if not missing:
        return Finding("ok", there)
    return Finding(
        "ok", f"{there}; not installed: {', '.join(missing)}", f"for one of these: pip install '{_OURS}[{missing[0]}]'"
    )


def needs(extra: str = "") -> Iterator[Requirement]:
    """What the package requires, or what an extra does beside that.

    Raises:
        PackageNotFoundError: The package is run without being installed.
    """
    for need in map(Requirement, requires(_OURS) or ()):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        wanted = always if not extra else need.marker and not always and need.marker.evaluate({"extra": extra})
        if wanted and need.name != _OURS:
            yield need


def fits(need: Requirement) -> bool:
    """Whether a requirement is met here."""
    there = installed(need.name)
    return there is not None and need.specifier.contains(there, prereleases=True)


def installed(name: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
