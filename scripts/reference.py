"""Write what docs/config.md, docs/presets.md and docs/api.md take from the code: python scripts/reference.py [--check].

Each part lies between two marks, ``<!-- fields -->`` and ``<!-- end of fields -->``; what stands outside of them is
written by hand and stays. A test fails where a page is not what the code says.
"""

# ruff: noqa: E402 - the path comes before the imports

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.reference_parts import api, fields, presets, settings

DOCS = ROOT / "docs"
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "config.md": {"fields": fields.table, "starts": fields.starts, "settings": settings.sections},
    "presets.md": {"presets": presets.table},
    "api.md": {"api": api.sections},
}


def filled(page: str, text: str) -> str:
    """A page with its generated parts as the code has them now.

    Args:
        page: Name of a file in docs/.
        text: What it holds.

    Raises:
        SystemExit: A mark is missing.
    """
    for mark, made in PAGES[page].items():
        between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
        if not between.search(text):
            raise SystemExit(f"docs/{page} lacks the marks <!-- {mark} --> and <!-- end of {mark} -->")
        part = made()
        text = between.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the pages, or with ``--check`` name those that are not current and leave with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    check = parser.parse_args().check
    old = []
    for page in PAGES:
        before = (DOCS / page).read_text(encoding="utf-8")
        after = filled(page, before)
        if before != after:
            old.append(page)
            if not check:
                (DOCS / page).write_text(after, encoding="utf-8")
    if check and old:
        raise SystemExit(f"not current: {', '.join(old)}; run python scripts/reference.py")


if __name__ == "__main__":
    main()
