"""Checkpoints that move between strategies, and rows of the table of strategies, from real runs of processes."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from resume import ACROSS, SAME, difference, resumed, run
from strategies import COLUMNS, ROWS, row_of

pytestmark = pytest.mark.usefixtures("warm_starts")

MOVES = (
    ("ddp", "ddp"),
    ("single", "fsdp2"),
    ("fsdp+sharded", "tp"),
    ("tp+early+sharded", "ddp"),
    ("fsdp2_tp", "single"),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_of_one_strategy_goes_on_under_another(tmp_path):
    found = {move: resumed(*move, tmp_path) for move in MOVES}
    assert {move: gap for move, gap in found.items() if gap > (SAME if len(set(move)) == 1 else ACROSS)} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["ddp_fork", "fsdp"])
def test_a_row_of_the_table(tmp_path, variant):
    row = next(row for row in ROWS if row[1] == variant)
    cells = dict(zip(COLUMNS, row_of(*row, tmp_path, ["--accelerator", "cpu"]), strict=True))
    for column in ("fit", "validate", "test", "resume"):
        assert float(cells[column]) <= 1e-5, cells
    if variant == "ddp_fork":  # Lightning gives none back from processes of its own
        assert cells["predict"] == "returns none"
    else:
        assert float(cells["predict"]) <= 1e-5, cells
        assert int(cells["bytes sharded"].replace(",", "")) > 0


@pytest.mark.slow
def test_clipping_by_hand_comes_after_averaging(tmp_path):
    runs = {name: run(name, tmp_path / name, "--by-hand") for name in ("single", "fsdp", "tp_partial")}
    for name in ("fsdp", "tp_partial"):
        assert difference(runs[name], runs["single"]) <= 1e-5


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_a_row_of_the_table_on_gpus(tmp_path, row):
    if not torch.cuda.is_available() or torch.cuda.device_count() < row[2]:
        pytest.skip(f"needs {row[2]} NVIDIA GPUs")
    if row[1].startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    cells = dict(zip(COLUMNS, row_of(*row, tmp_path, ["--accelerator", "gpu"]), strict=True))
    assert float(cells["fit"]) <= 1e-4, cells
    assert float(cells["resume"]) <= 1e-6, cells


def test_the_table_in_the_document_has_every_row():
    text = Path(__file__).parents[2].joinpath("docs", "strategies.md").read_text(encoding="utf-8")
    for mark in ("cpu", "gpu"):
        table = text.split(f"<!-- {mark} table -->")[1].split(f"<!-- end of {mark} table -->")[0]
        assert [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]] == [row[0] for row in ROWS]
