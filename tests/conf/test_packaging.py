"""What the wheel holds, asked of the build backend itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import lora_lightning

ROOT = Path(lora_lightning.__file__).parents[1]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_everything_is_packed_once(kind):
    builders = pytest.importorskip(f"hatchling.builders.{kind}")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    builder = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    packed = [str(file.distribution_path) for file in getattr(builders, builder)(str(ROOT)).recurse_included_files()]
    assert len(packed) == len(set(packed))
    wanted = [
        "lora_lightning/py.typed",
        "lora_lightning/conf/__init__.py",
        "lora_lightning/conf/train.yaml",
        "lora_lightning/conf/experiment/smoke.yaml",
        "lora_lightning/presets/__init__.py",
        "lora_lightning/presets/lora/balanced.yaml",
        "lora_lightning/presets/lora/conservative.yaml",
        "lora_lightning/presets/lora/high_capacity.yaml",
        "hydra_plugins/lora_lightning/__init__.py",
    ]
    assert set(wanted) <= set(packed)
    assert "hydra_plugins/__init__.py" not in packed
    assert not [path for path in packed if path.startswith(("conf/", "lora_lightning/conf/lora", "outputs/", ".venv/"))]


def test_all_that_tests_read_is_in_the_sdist(tmp_path):
    sdist = pytest.importorskip("hatchling.builders.sdist")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    links = {"conf", "lora_lightning/conf/lora"}  # the folders behind them are packed
    tracked = {path for path in listed if (ROOT / path).is_file() and not path.startswith((".ci/", ".gitattributes"))}
    with tarfile.open(next(sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path)))) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert tracked - links <= packed


def test_configs_compose_without_the_links(tmp_path):
    """On Windows a link is checked out as a text file: the presets are found all the same."""
    package = tmp_path / "lora_lightning"
    shutil.copytree(ROOT / "lora_lightning", package, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    shutil.copytree(ROOT / "hydra_plugins", tmp_path / "hydra_plugins")
    link = package / "conf" / "lora"
    link.unlink()
    link.write_text("../presets/lora")
    code = (
        "from hydra import compose, initialize_config_module as init\n"
        "with init('lora_lightning.conf', version_base='1.3'):\n"
        "    print(compose('train', overrides=['lora=high_capacity', 'lora.r=32']).lora.lora_alpha)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "64", done.stderr
