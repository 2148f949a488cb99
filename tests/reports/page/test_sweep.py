"""The page of a sweep, from the folders of sweeps that reports are tested with."""

from urllib.parse import unquote

import pytest

from lora_lightning.cli.sweep_report import report
from tests.reports.page.folders import Page
from tests.sweeps.report.folders import believable, write_sweep

BAD = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    jobs = [believable([f"lora.r={rank}", f"learning_rate={rate}"]) for rank in (4, 16) for rate in ("1e-3", "3e-3")]
    jobs.append(
        {"overrides": ["lora.r=64", f"note={BAD}"], "result": {"status": "failed"}, "log": f"ValueError: {BAD}"}
    )
    place = write_sweep(tmp_path_factory.mktemp("sweep") / "mine", jobs)
    (place / "1" / "report.html").write_text("a page of its own")
    report(place)
    return place


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "report.html")


def test_tables_pictures_and_commands_are_there(page):
    assert page.sections[:2] == ["jobs", "pictures"] or {"jobs", "pictures", "again"} <= set(page.sections)
    for text in (
        "4 of 5 done",
        "5 jobs: 4 finished, 1 failed",
        "Failed",
        "python scripts/train.py -m",
        "Best val_loss",
    ):
        assert text in page.text, text
    assert len(page.values("img", "src")) >= 3
    assert all(each.startswith("data:image/png;base64,") for each in page.values("img", "src"))


def test_the_best_is_marked_and_first(page):
    marked = [attributes for tag, attributes in page.tags if tag == "tr" and attributes.get("class") == "best"]
    assert len(marked) == 1
    rows = [place for place, (tag, _) in enumerate(page.tags) if tag == "tr"]
    assert page.tags[rows[1]][1].get("class") == "best"  # behind the headings


def test_jobs_lead_to_their_pages_or_folders(page, folder):
    links = page.values("a", "href")
    assert "./1/report.html" in links
    assert "./0/" in links
    assert all((folder / unquote(each)).exists() for each in links)


def test_hostile_texts_are_texts(page):
    assert page.text.count(BAD) >= 2  # a setting, and the reason of the failure
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_it_is_small(page):
    assert len(page.source) < 500_000


def test_another_page_there_is_told_and_left_alone(tmp_path):
    place = write_sweep(tmp_path / "sweep", [believable(["lora.r=4"]), believable(["lora.r=8"])])
    (place / "report.html").write_text("mine")
    with pytest.warns(UserWarning, match="could not be written"):
        assert report(place).is_file()  # the rest of the report is there
    assert (place / "report.html").read_text() == "mine"
