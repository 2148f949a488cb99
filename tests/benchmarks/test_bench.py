"""The commands: they run through, fail for wrong gradients only, and write what they found."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench, page
from benchmarks.contenders import Contender

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def whole():
    """One quick run of everything, and what it printed."""
    run, shown = bench.Bench(1, 1, True), io.StringIO()
    with contextlib.redirect_stdout(shown):
        bench.measure(run, bench.SECTIONS)
        status = bench.finish(run)
    return run, shown.getvalue(), status


def test_every_section_runs_and_missed_targets_are_no_failure(whole):
    run, shown, status = whole
    assert status == 0
    assert list(run.sections) == list(bench.SECTIONS)
    for target in ("0.68", "1.09", "1.15", "0.75", "1.03", "0.5", "0.2 s", "0.1", "1.3", "0.4"):
        assert f"≤ {target}" in shown
    assert "│ no " in shown  # tiny shapes reach few targets


def test_wrong_gradients_fail_the_run(monkeypatch, capsys):
    right = Contender.gradients
    monkeypatch.setattr(Contender, "gradients", lambda self, batch: {k: v * 1.1 for k, v in right(self, batch).items()})
    assert bench.main(["--quick", "--threads", "1", "--only", "injection", "shapes"]) == 1
    assert "No figure counts" in capsys.readouterr().err


def test_quick_figures_are_never_written():
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--write"])


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and a page, of this test."""
    document = tmp_path / "performance.md"
    document.write_text(page.DOCUMENT.read_text(encoding="utf-8") + "\nBy hand.\n", encoding="utf-8")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "cpu.json")
    monkeypatch.setattr(page.write, "__defaults__", (document, tmp_path))
    return tmp_path


def test_results_and_page_are_written(results, whole):
    bench.write(whole[0])
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    assert list(told["sections"]) == list(bench.SECTIONS)
    assert told["checks"]
    assert str(ROOT) not in json.dumps(told)
    text = (results / "performance.md").read_text(encoding="utf-8")
    assert text.endswith("\nBy hand.\n")
    for words in ("| + dropout (both with it) |", "**frozen floor**, ", "| ≤ 0.68 |", "import lora_lightning"):
        assert words in text


def test_a_section_takes_the_place_of_its_earlier_figures(results, whole):
    bench.write(whole[0])
    run = bench.Bench(1, 1, True)
    bench.measure(run, ["injection"])
    run.told["rows"][0]["what"] = "anew"
    bench.write(run)
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    assert list(told["sections"]) == list(bench.SECTIONS)
    assert told["sections"]["injection"]["rows"][0]["what"] == "anew"
    assert len(told["checks"]) == len(whole[0].checks)


def test_part_of_a_run_is_not_mixed_with_another_machines(results, whole):
    bench.write(whole[0])
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    told["machine"]["cpu"] = "another"
    (results / "cpu.json").write_text(json.dumps(told), encoding="utf-8")
    run = bench.Bench(1, 1, True)
    bench.measure(run, ["injection"])
    with pytest.raises(SystemExit, match="another machine"):
        bench.write(run)


def test_page_in_the_repository_is_what_its_results_make(tmp_path):
    copy = tmp_path / "performance.md"
    copy.write_text(page.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    page.write(copy)
    assert copy.read_text(encoding="utf-8") == page.DOCUMENT.read_text(encoding="utf-8")


# Stands in for a machine that has torch and transformers only.
BARE = """
import importlib.util, runpy, sys
GONE = {"hydra", "omegaconf", "datasets", "wandb", "matplotlib", "torchmetrics", "lightning", "pytorch_lightning",
        "rich", "peft"}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
sys.meta_path.insert(0, Gone())
find = importlib.util.find_spec
def tell(name, package=None):
    return None if name.split(".")[0] in GONE else find(name, package)
importlib.util.find_spec = tell
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rsplit("/", 1)[0]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not GONE & set(sys.modules), GONE & set(sys.modules)
"""


def test_gpu_script_needs_only_torch_and_transformers_and_leaves_what_it_has(tmp_path):
    out = tmp_path / "cuda.json"
    script = str(ROOT / "benchmarks" / "cuda.py")
    arguments = ["--device", "cpu", "--quick", "--only", "1B, 4×2048, r=16", "profiles", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told["check"]["right"]
    by_title = {row["title"]: row["contenders"] for row in told["rows"]}
    main = by_title["1B, 4×2048, r=16"]
    assert main["PEFT as shipped"] == {"not_run": "peft is not installed"}
    assert main["ours"]["seconds"]["n"] == 2
    assert by_title["1B, 4×2048, profiles"]["floor"]["profile"]["ops"]
    text = page.cuda(told)
    assert "ours, no dropout / floor" in text
    assert "peft is not installed" in text


def test_gpu_script_begins_no_row_when_the_time_is_up(tmp_path, warm_python):
    out = tmp_path / "cuda.json"
    command = [
        warm_python,
        "benchmarks/cuda.py",
        "--device",
        "cpu",
        "--quick",
        "--minutes",
        "0",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text(encoding="utf-8"))
    assert not told["rows"]
    assert len(told["not_begun"]) > 10


def test_gpu_script_does_not_stand_before_the_package_of_its_name(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("THEIRS = True\n", encoding="utf-8")
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}, {str(tmp_path)!r}]; import cuda; cuda.THEIRS"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
