import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_lightning.injection import LoraReport, LoraRow
from lora_lightning.reports import closing_table, first_table
from lora_lightning.reports.tables import effective_batch


def printed(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def rows():
    layers = [
        LoraRow(f"model.layers.{layer}.self_attn.{kind}_proj", "Linear", (576, 576), 16, 2.0, 18_432)
        for layer in range(30)
        for kind in "qv"
    ]
    return [*layers, LoraRow("head", "in full", (576, 5), 0, 0.0, 2_885)]


def report(rows):
    return LoraReport(rows, trainable_parameters=1_108_805, total_parameters=135_000_000)


def test_first_table(rows):
    text = printed(first_table(report(rows), batch_size=4, accumulate=2, devices=2, training_rows=1000, nothing=None))
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert cells == [
        ["q_proj", "Linear", "576 → 576", "30", "16", "2", "552,960"],
        ["v_proj", "Linear", "576 → 576", "30", "16", "2", "552,960"],
        ["head", "in full", "576 → 5", "1", "-", "-", "2,885"],
    ]
    assert "1,108,805 of 135,000,000 parameters (0.82%)" in text
    assert "4 rows × 2 accumulated × 2 devices = 16" in text
    assert "Training rows" in text
    assert "Nothing" not in text


def test_different_ranks_stand_apart(rows):
    rows[0] = replace(rows[0], r=64)
    assert "29" in printed(first_table(report(rows)))
    assert "One step" not in printed(first_table(report(rows)))


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
