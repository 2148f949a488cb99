"""A whole run looks at its layers and is judged by them."""

import json

import pytest

from lora_lightning.cli.train import main
from lora_lightning.reports.insight import read_rows


def test_a_run_leaves_insight_and_advice(smoke):
    folder, screen = smoke
    rows = read_rows(folder / "insight.csv")
    assert {row.step for row in rows} == {15, 30}
    assert len(rows) == 2 * 14
    assert all(0 < row.effective_rank <= row.r == 64 for row in rows)
    assert all(row.grad_norm_A and row.grad_norm_B for row in rows)
    assert (folder / "insight.png").stat().st_size > 5000
    told = json.loads((folder / "result.json").read_text())["advice"]
    page = (folder / "advice.md").read_text()
    assert "\nAdvice" in screen
    for advice in told:
        assert advice["sentence"] in page
    assert {advice["rule"] for advice in told} <= {"rank unused"}  # of 64, on a model whose layers are 64 wide


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_is_judged_too(call, tmp_path):
    """At a learning rate of the optimizer's own, which is what there is to change."""
    rate = ["optimizer=sgd", "optimizer.lr=200", "trainer.gradient_clip_val=null"]
    call(main, "experiment=smoke", *rate, "callbacks.samples=null", f"hydra.run.dir={tmp_path / 'run'}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"].startswith("NonFiniteError: ")
    (advice,) = result["advice"]
    assert (advice["rule"], advice["override"]) == ("learning rate too high", "optimizer.lr=70")
    assert "the run was stopped" in (tmp_path / "run" / "advice.md").read_text()
