"""Pages made from the code are what the code says now, and nothing is left out of them."""

from __future__ import annotations

import doctest

import pytest
import yaml

from scripts import reference
from scripts.reference_parts import markdown, settings
from scripts.reference_parts.settings import CONF, File


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_page_is_current(page):
    text = (reference.DOCS / page).read_text(encoding="utf-8")
    assert text == reference.filled(page, text), "run python scripts/reference.py"


def test_a_mark_that_is_missing_is_told():
    with pytest.raises(SystemExit, match=r"presets.md lacks the marks <!-- presets -->"):
        reference.filled("presets.md", "# Presets\n")


def leaves(value, prefix=""):
    for key, inner in value.items():
        if key in ("defaults", "_partial_", "_recursive_", "_convert_"):
            continue
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name != "lora")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_is_found_with_its_value(path):
    """Against what YAML itself reads."""
    found = {key.name: key.value for key in File(path).entries() if key.value}
    for name, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8")) or {}):
        flow = next((outer for outer in found if name.startswith(f"{outer}.")), name)  # a table written in one line
        assert flow in found
        if flow == name and not isinstance(value, list):
            told = yaml.safe_load(found[name])
            assert told == (value.strip() if isinstance(value, str) else value)  # a block ends at its last line


def test_comments_are_those_of_the_line_or_the_lines_above(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "# @package _global_\n# What it is.\n# In two lines.\ndefaults:\n  - other\n\n"
        "_partial_: true  # not shown\n# above\n# it\na: '#x'\nb:  # of the table\n  c: [1, 2]  # of the list\nd: {}\n"
    )
    file = File(path)
    assert (file.about, file.builds_on) == ("What it is. In two lines.", ["other"])
    assert file.entries() == [
        ("a", "'#x'", "above it"),
        ("b", "", "of the table"),
        ("b.c", "[1, 2]", "of the list"),
        ("d", "{}", ""),
    ]


def test_every_group_and_choice_has_its_heading():
    page = settings.sections()
    for path in FILES:
        if path.parent != CONF and not path.stem.startswith("_"):
            assert f"#### {path.parent.relative_to(CONF)}={path.stem}\n" in page


def test_examples_of_the_helpers():
    assert doctest.testmod(markdown).failed == 0
