"""Pages in a real browser: Chromium, headless."""

import io

import pytest
from PIL import Image

from lora_lightning.cli.sweep_report import report
from lora_lightning.reports.page import run_page
from tests.reports.page import browser
from tests.reports.page.folders import HOSTILE, write_run
from tests.sweeps.report.folders import believable, write_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason=f"there is no browser: none of {', '.join(browser.NAMES)}"),
]
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((each) => !each.closest(".scroll, pre") &&
  !each.closest("svg") && each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => each.className)"""
SCROLLS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
SECTIONS = "[...document.querySelectorAll('section[id]')].map((each) => each.id)"
COVERED = """[...document.querySelectorAll("section, figure, table")].filter((each) => each.offsetHeight < 20).length"""
POINTED = """(() => { const area = document.querySelector(".area"), box = area.getBoundingClientRect();
  area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  return area.querySelector(".tip").innerText; })()"""
SORTED = """(() => { document.querySelectorAll("th button")[1].click();
  const rows = [...document.querySelector("table.sortable").tBodies[0].rows];
  return rows.map((row) => row.cells[2].innerText); })()"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_page(write_run(tmp_path_factory.mktemp("browser") / "run"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    settings = [[f"lora.r={rank}", f"learning_rate={rate}"] for rank in (4, 8, 16) for rate in ("1e-3", "3e-3")]
    folder = write_sweep(tmp_path_factory.mktemp("browser") / "sweep", [believable(each) for each in settings])
    report(folder)
    return folder / "report.html"


def colours_of(png):
    with Image.open(io.BytesIO(png)) as image:
        return image.size, {colour for _, colour in image.convert("RGB").resize((300, 900)).getcolors(300 * 900)}


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "dark")])
@pytest.mark.parametrize("which", ["run", "sweep"])
def test_on_a_phone_and_on_a_desk(which, width, scheme, request, tmp_path):
    page = request.getfixturevalue(which)
    asked = (SECTIONS, SCROLLS, TOO_WIDE, COVERED, "document.title")
    seen = browser.look(page, tmp_path, *asked, width=width, scheme=scheme)
    sections, scrolls, too_wide, covered, title = seen.answers
    assert seen.complaints == []
    assert [each for each in seen.requests if not each.startswith("data:")] == [page.as_uri()]
    assert not scrolls
    assert too_wide == []
    assert covered == 0
    assert title == {"run": "headlines", "sweep": "sweep"}[which]  # the hostile text did not run
    expected = {
        "run": ["figures", "curves", "samples", "advice", "insight", "layers", "settings", "environment"],
        "sweep": ["best", "jobs", "pictures", "again"],
    }
    assert sections == expected[which]
    (across, _), colours = colours_of(seen.picture)
    assert across == pytest.approx(1.5 * width, abs=2)
    assert len(colours) > 50  # not blank
    ground = {"light": (252, 252, 250), "dark": (20, 23, 27)}[scheme]
    assert ground in colours
    assert seen.pdf.startswith(b"%PDF")
    assert len(seen.pdf) > 20_000


def test_the_pointer_shows_values(run, tmp_path):
    """At the middle of 40 steps: what the metrics say of step 20."""
    (said,) = browser.look(run, tmp_path, POINTED, width=1280).answers
    assert said.splitlines()[:2] == ["step 20", f"training {4 / 2.9:.4g}"]
    assert said.splitlines()[2].startswith(f"validation {4.4 / (1 + 19 / 12):.4g}")


def test_a_table_is_sorted(sweep, tmp_path):
    """By its second heading that says anything: the rank."""
    seen = browser.look(sweep, tmp_path, SORTED, width=1280)
    assert seen.complaints == []
    assert seen.answers == [["4", "4", "8", "8", "16", "16"]]


def test_scripts_of_others_do_not_run(tmp_path):
    """Even where a text reached the page as it is, the browser would not run it: the page's own policy forbids."""
    page = run_page(write_run(tmp_path / "run"))
    page.write_text(page.read_text().replace("<main>", f"<main>{HOSTILE}", 1))
    seen = browser.look(page, tmp_path / "profile", "document.title")
    assert seen.answers == ["headlines"]
    assert any("Content Security Policy" in each for each in seen.complaints)
    assert not [each for each in seen.requests if each.endswith("/x")]
