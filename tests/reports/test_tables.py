import io
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_lightning.reports import closing_table, first_table
from lora_lightning.reports.tables import effective_batch


def printed(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def report():
    rows = [
        SimpleNamespace(
            name=f"model.layers.{layer}.self_attn.{kind}_proj", kind="Linear", shape=(576, 576), r=16, scaling=2.0,
            parameters=18_432,
        )
        for layer in range(30)
        for kind in "qv"
    ]  # fmt: skip
    rows.append(SimpleNamespace(name="head", kind="in full", shape=(576, 5), r=0, scaling=0.0, parameters=2_885))
    return SimpleNamespace(rows=rows, trainable_parameters=1_108_805, total_parameters=135_000_000)


def test_first_table(report):
    text = printed(first_table(report, batch_size=4, accumulate=2, devices=2, training_rows=1000, nothing=None))
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert cells == [
        ["30", "q_proj", "Linear", "576 × 576", "16", "2", "552,960"],
        ["30", "v_proj", "Linear", "576 × 576", "16", "2", "552,960"],
        ["1", "head", "in full", "576 × 5", "–", "–", "2,885"],
    ]
    assert "1,108,805 of 135,000,000 parameters (0.82%)" in text
    assert "4 rows × 2 accumulated × 2 devices = 16" in text
    assert "Training rows" in text
    assert "Nothing" not in text


def test_different_ranks_stand_apart(report):
    report.rows[0].r = 64
    assert "29" in printed(first_table(report))
    assert "One step" not in printed(first_table(report))


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_effective_batch_is_right_arithmetic(rows, accumulated, devices):
    left, _, product = effective_batch(rows, accumulated, devices).partition(" = ")
    factors = [int(part.split()[0]) for part in left.split(" × ")]
    total = 1
    for factor in factors:
        total *= factor
    assert total == rows * accumulated * devices
    assert product in ("", str(total))


def test_closing_table():
    text = printed(
        closing_table(
            {
                "status": "completed", "val_loss_before": 4.5141, "val_loss": 2.4512, "perplexity": 11.6, "steps": 80,
                "seconds": 264.2, "tokens_per_second": 1234.5, "peak_memory_bytes": 3 * 2**30, "adapter_path": "a/[b]",
                "overrides": [],
            }
        )
    )  # fmt: skip
    for part in ("completed", "4.514 → 2.451", "11.60", "264 s", "1,234 tokens/s", "3.00 GiB", "a/[b]"):
        assert part in text
    assert "Accuracy" not in text


def test_closing_table_of_a_classifier():
    text = printed(
        closing_table({"status": "failed", "val_accuracy_before": 0.2, "val_accuracy": 0.97, "val_loss": None})
    )
    assert "0.200 → 0.970" in text
    assert "Validation loss" not in text
