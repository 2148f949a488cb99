"""The page of a run, from folders in every state: what stands on it, and what must not."""

import json
import subprocess
import sys
from urllib.parse import unquote

import pytest

from lora_lightning.errors import AdapterError
from lora_lightning.reports.page import run_page, try_page
from lora_lightning.reports.page.settings import what_matters
from tests.reports.page.folders import HOSTILE, Page, write_run

SECTIONS = ["figures", "curves", "samples", "advice", "insight", "layers", "settings", "environment"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(run_page(write_run(tmp_path_factory.mktemp("whole") / "run")))


def test_all_that_the_folder_holds_is_there(page):
    assert page.sections == SECTIONS
    for text in ("4.40 → 2.20", "−50 %", "50.0 % → 89.0 %", "+39.0 points", "4.00 %", "16 kB", "4 min 22 s", "1.5 GB"):
        assert text in page.text.replace("→", " → ").replace("  ", " "), text
    for text in (
        "before training",
        "after training",
        "half way",
        "Lower r.",
        "lora.r=8",
        "4,000 of 100,000 parameters",
    ):
        assert text in page.text, text


def test_scale_is_that_of_the_layers(page):
    """Alpha over the root of the rank, with rsLoRA: 32 / 4."""
    after = page.texts[page.texts.index("scale", page.texts.index("lora_alpha")) :]
    assert next(text for text in after[1:] if text.strip()) == "8"


def test_hostile_texts_are_texts(page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 1
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")
    assert page.text.count(shown) == 7  # prompt, before, after, reference, advice, command, device
    assert "\u202e" not in page.source
    assert "\x1b" not in page.source


def test_it_needs_no_other_file(page):
    addresses = [*page.values("a", "href"), *page.values("link", "href"), *page.values("img", "src")]
    assert all(each.startswith(("./", "data:")) for each in addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = next(each for each in page.values("meta", "content") if "default-src" in each)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert len(page.source.encode()) < 100_000


def test_links_lead_to_files_that_are_there(tmp_path):
    folder = write_run(tmp_path / "run")
    links = Page(run_page(folder)).values("a", "href")
    assert {"./adapter/", "./metrics.csv", "./config.yaml"} <= set(links)
    assert all((folder / unquote(each)).exists() for each in links)


def test_what_was_typed_is_marked(page, tmp_path):
    marked = [attributes.get("class") for tag, attributes in page.tags if tag == "dd"].count("given")
    assert marked == 2  # lora.r and seed
    assert "What was typed has a dot" in page.text
    folder = write_run(tmp_path / "run")
    for name in ("result.json", "about.json"):
        told = json.loads((folder / name).read_text()) | {"overrides": []}
        (folder / name).write_text(json.dumps(told))
    assert "What was typed has a dot" not in Page(run_page(folder)).text


def test_what_was_typed_is_shown_whatever_it_says():
    config = {
        "lora": {"r": 8, "bias": "none", "use_dora": False, "use_rslora": False},
        "data": {"path": "x", "val_rows": 0, "num_workers": 0, "samples": {"every": 5}, "packing": False},
        "trainer": {"limit_val_batches": 0, "devices": 1, "num_nodes": 1, "precision": None},
    }
    typed = ["lora.bias=none", "++lora.use_dora=false", "data.val_rows=0", "data.num_workers=0", "data.samples.every=5"]
    typed += ["trainer.limit_val_batches=0", "trainer.devices=1", "trainer.precision=null"]
    shown = {each.key: (each.value, each.given) for group in what_matters(config, typed) for each in group.settings}
    assert shown == {
        "r": ("8", False),
        "bias": ("none", True),
        "use_dora": ("false", True),
        "path": ("x", False),
        "val_rows": ("0", True),
        "num_workers": ("0", True),
        "samples": ("every: 5", True),
        "limit_val_batches": ("0", True),
        "devices": ("1", True),
        "precision": ("null", True),
    }


def test_advice_with_its_numbers_or_that_there_is_none(page, tmp_path):
    assert "Rank unused Lower r." in page.text
    assert "mean rank used 0.31 · layers q_proj, v_proj" in page.text
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    for advice, shown in (([], True), (None, False), ("nonsense", False)):
        (folder / "result.json").write_text(json.dumps(result | {"advice": advice}))
        page = Page(run_page(folder))
        assert ("advice" in page.sections) == shown
        assert ("asks for another setting" in page.text) == shown


def test_insight_is_that_of_the_last_time(page):
    cells = [each for each in page.values("i", "title") if each]
    assert len(cells) == 12  # two grids of two kinds by three blocks
    assert "q_proj in block 0: 25 %" in cells  # an effective rank of 4 in 16
    assert "v_proj in block 0: 50 %" in cells
    assert "After 40 steps" in page.text
    assert "insight/rank_used_mean" not in page.text  # no chart of its own


def test_an_unfinished_run_says_so(tmp_path):
    page = Page(run_page(write_run(tmp_path / "run", steps=23, finished=False)))
    assert "unfinished" in page.text
    assert "23 of 40 steps are known to be done" in page.text
    assert "Missing: the figures of the end, the adapter." in page.text
    assert "Validation loss so far" in page.text
    assert page.sections == [each for each in SECTIONS if each != "advice"]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_was_broken_off(tmp_path, status):
    folder = write_run(tmp_path / "run", steps=12)
    result = json.loads((folder / "result.json").read_text()) | {"status": status, "steps": 12}
    (folder / "result.json").write_text(json.dumps(result))
    words = {"interrupted": "This run was interrupted", "failed": "This run was ended by an error"}
    assert f"{words[status]} after 12 of 40 steps." in Page(run_page(folder)).text


def test_the_least_that_a_run_leaves(tmp_path):
    (tmp_path / "config.yaml").write_text("name: begun\n")
    page = Page(run_page(tmp_path))
    assert "begun" in page.text
    assert "0 steps are known to be done" in page.text
    assert page.sections == ["figures", "settings", "environment"] or page.sections == ["figures", "environment"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"status": "fin'),
        ("result.json", "[1, 2]"),
        ("about.json", "\x00"),
        ("config.yaml", "lora: {r: 16"),
        ("metrics.csv", "step,train_loss\n0,4.1\n1,3."),
        ("metrics.csv", "epoch,train_loss\n0,4.1\n"),
        ("metrics.csv", "step,val_loss\n,nan\n"),
        ("insight.csv", "step,layer\n1,2\n"),
        ("samples.jsonl", '{"title": "Before training", "step": 0, "samples": []}\n{"tit'),
    ],
)
def test_a_file_that_was_broken_off_costs_its_own_part_only(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    page = Page(run_page(folder))
    assert page.sections[0] == "figures"
    whole = name == "metrics.csv" and "step,train" in content
    if not whole and not (name == "metrics.csv" and content.startswith("epoch")) and name != "samples.jsonl":
        assert f"{name} cannot be read" in page.text


def test_values_that_are_not_finite(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,train_loss,val_loss\n0,4.0,\n1,nan,inf\n2,3.0,nan\n")
    result = json.loads((folder / "result.json").read_text()) | {"val_loss": None}
    (folder / "result.json").write_text(json.dumps(result))
    source = Page(run_page(folder)).source
    assert "nan" not in source.partition("<svg")[2].partition("</svg>")[0].lower()


def test_a_page_of_somebody_elses_is_left_alone(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(AdapterError, match=r"was not written by lora_lightning.*move it away"):
        run_page(folder)
    with pytest.warns(UserWarning, match="could not be written"):
        assert try_page(folder) is None  # a run does not fail for it
    assert (folder / "report.html").read_text() == "<p>mine</p>"
    (folder / "report.html").unlink()
    assert run_page(folder) == run_page(folder) == folder / "report.html"  # its own is made again
    assert not list(folder.glob(".report*"))


def test_without_torch(tmp_path):
    """A page of a folder is there at once."""
    folder = write_run(tmp_path / "run")
    code = f"from lora_lightning.reports.page import run_page; run_page({str(folder)!r}); import sys; "
    code += "print([name for name in ('torch', 'lightning', 'transformers', 'hydra') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
