"""The site: it is built with no link that leads nowhere, and loads nothing from elsewhere."""

from __future__ import annotations

import re

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)  # raises where anything was warned of
    return folder


def test_every_page_is_built_and_in_the_list_of_contents(site):
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert re.search(rf"^\s+- {page.name}$", listed, re.MULTILINE), f"{page.name} is not in mkdocs.yml"


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    for page in site.glob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name


def test_search_finds_a_key(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "gradient_checkpointing" in index
