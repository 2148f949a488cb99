"""What is said of two models that were measured on the same."""

import io
import math

import pytest
from rich.console import Console

from lora_lightning.reports.side_by_side import Measured, comparison, of_metrics


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (Measured("", 2.0, 1.0, False), "better"),
        (Measured("", 2.0, 1.0, True), "worse"),
        (Measured("", 1.0, 2.0, True), "better"),
        (Measured("", 1.0, 1.0, True), "same"),
        (Measured("", 1.0, 2.0, None), ""),
        (Measured("", 0.50, 0.53, True, 0.03, 0.03), "within error"),
        (Measured("", 0.50, 0.55, True, 0.03, 0.03), "better"),
        (Measured("", math.nan, 0.55, True), ""),
    ],
)
def test_verdict(measured, verdict):
    assert measured.verdict == verdict


def test_metrics_of_the_tasks_are_known_by_name():
    base = {"val_loss": 2.0, "val_perplexity": 7.4, "val_accuracy": 0.2, "val_f1": 0.1, "val_own": 1.0}
    better = {"val_loss": 1.0, "val_perplexity": 2.7, "val_accuracy": 0.9, "val_f1": 0.9, "val_own": 2.0}
    assert [each.verdict for each in of_metrics(base, better)] == ["better"] * 4 + [""]


def test_one_line_a_metric():
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison([Measured("loss", 2.0, 1.5, False), Measured("acc", 0.5, 0.4, True, 0.01, 0.02)]))
    lines = [line.split() for line in console.file.getvalue().splitlines() if "│" in line]
    assert lines == [
        ["│", "loss", "│", "2.0000", "│", "1.5000", "│", "-0.5000", "│", "better", "│"],
        ["│", "acc", "│", "0.5000", "±", "0.0100", "│", "0.4000", "±", "0.0200", "│", "-0.1000", "│", "worse", "│"],
    ]
