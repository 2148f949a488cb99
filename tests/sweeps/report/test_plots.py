"""The pictures: that they are there, that something is drawn on them, and what."""

import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from lora_lightning.sweeps.report import plots
from lora_lightning.sweeps.report.by_key import by_key
from lora_lightning.sweeps.report.collect import collect
from lora_lightning.sweeps.report.parallel import parallel_coordinates
from lora_lightning.sweeps.report.plots import draw_all, validation_curves
from tests.sweeps.report.folders import believable, write_sweep


def grid(**axes):
    names = [name.replace("__", ".") for name in axes]
    return [
        believable([f"{name}={value}" for name, value in zip(names, values, strict=True)])
        for values in itertools.product(*axes.values())
    ]


def swept(folder, jobs, **facts):
    return collect(write_sweep(folder, jobs, **facts))


RANKS, RATES = ["4", "8", "64"], ["3e-4", "1e-3", "3e-3"]


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        (grid(lora__r=["8"]), {"val_loss_curves"}),
        (grid(lora__r=RANKS), {"val_loss_by_r", "val_loss_curves"}),
        (grid(seed=["0", "1"]), {"val_loss_curves"}),
        (
            grid(lora__r=RANKS, learning_rate=RATES),
            {"val_loss_by_r", "val_loss_by_learning_rate", "parallel", "val_loss_curves"},
        ),
    ],
)
def test_each_picture_is_there_and_not_blank(tmp_path, jobs, names):
    sweep = swept(tmp_path, jobs)
    made = draw_all(sweep)
    assert set(made) == {f"plots/{name}.png" for name in names}
    for path in made:
        pixels = imread(tmp_path / path)[..., :3]
        assert pixels.std() > 0.02
        edge = np.concatenate([pixels[0], pixels[-1]])
        assert (edge == 1).mean() > 0.95  # nothing runs off the paper


def test_pictures_are_the_same_bytes_again(tmp_path):
    sweep = swept(tmp_path, grid(lora__r=RANKS, learning_rate=RATES))
    first = {path: (tmp_path / path).read_bytes() for path in draw_all(sweep)}
    assert {path: (tmp_path / path).read_bytes() for path in draw_all(sweep)} == first


def lines_of(figure):
    """The lines with several points, as (x, y) arrays."""
    return [
        line.get_xydata()
        for line in figure.axes[0].lines
        if len(line.get_xdata()) > 1 and line.get_linestyle() != "None"
    ]


def test_ranks_double_along_the_axis_and_rates_are_lines(tmp_path):
    sweep = swept(tmp_path, grid(lora__r=RANKS, learning_rate=RATES))
    figure = by_key(sweep, "lora.r")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == RANKS
    lines = lines_of(figure)
    assert len(lines) == len(RATES)
    drawn = {tuple(line[:, 1]) for line in lines}
    assert all((line[:, 0] == [2, 3, 6]).all() for line in lines)
    assert drawn == {
        tuple(row.metric for row in sweep.rows if row.settings["learning_rate"] == float(rate)) for rate in RATES
    }


def test_seeds_are_a_mean_with_its_spread(tmp_path):
    sweep = swept(tmp_path, grid(lora__r=RANKS, seed=["0", "1", "2"]))
    figure = by_key(sweep, "lora.r")
    values = np.array([row.metric for row in sweep.rows]).reshape(3, 3)
    (line,) = lines_of(figure)
    np.testing.assert_allclose(line[:, 1], values.mean(1))
    bars = np.array(figure.axes[0].collections[0].get_segments())[:, :, 1]
    np.testing.assert_allclose(np.diff(bars, axis=1)[:, 0], 2 * values.std(1, ddof=1))


def test_a_random_search_is_points(tmp_path):
    jobs = [believable([f"learning_rate={1e-4 * 1.1**n:.6g}", f"x={n % 3}.{n}1"]) for n in range(30)]
    sweep = swept(tmp_path, jobs)
    figure = by_key(sweep, "learning_rate")
    assert not lines_of(figure)
    assert figure.axes[1].get_ylabel() == "x"  # more values than colours: a bar


def test_what_agrees_in_all_else_is_joined_among_points(tmp_path):
    """Of two stages, rates and then ranks at the best rate, the second is a line over the ranks."""
    jobs = [*grid(lora__r=["8"], learning_rate=RATES), *grid(lora__r=["4", "64"], learning_rate=["1e-3"])]
    (line,) = lines_of(by_key(swept(tmp_path, jobs), "lora.r"))
    assert line[:, 0].tolist() == [2, 3, 6]


@pytest.mark.filterwarnings("error")
def test_a_setting_of_no_finished_job_has_no_picture(tmp_path):
    failed = {"overrides": ["lora.r=64", "note=x"], "result": {"status": "failed"}}
    made = draw_all(swept(tmp_path, [*grid(lora__r=RANKS), failed]))
    assert "plots/val_loss_by_r.png" in made
    assert "plots/val_loss_by_note.png" not in made


def test_one_that_is_far_off_is_marked_at_the_edge(tmp_path):
    jobs = grid(lora__r=["2", "4", "8", "16", "32"])
    jobs[0]["result"]["val_loss"] = 1e5
    axes = by_key(swept(tmp_path, jobs), "lora.r").axes[0]
    assert axes.get_ylim()[1] < 3
    assert axes.get_title(loc="right") == "1 job beyond, as far as 1e5"


def test_parallel_coordinates_have_a_line_a_job_and_the_best_on_top(tmp_path):
    sweep = swept(tmp_path, grid(lora__r=RANKS, learning_rate=RATES))
    figure = parallel_coordinates(sweep)
    lines = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 3]
    assert len(lines) == 9
    assert lines[-1].get_label().startswith(f"best: job {sweep.best.number}, {sweep.best.metric:.5g}")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["lora.r", "learning_rate", "val_loss"]
    ends = [line.get_ydata()[-1] for line in lines]
    assert ends == sorted(ends, reverse=True)


def test_curves_join_the_parts_of_a_resumed_job(tmp_path):
    folder = write_sweep(tmp_path, grid(lora__r=["8"]))
    (folder / "0" / "metrics-1.csv").write_text("step,val_loss\n4,9\n24,8\n")
    (line,) = lines_of(validation_curves(collect(folder)))
    assert line[:, 0].tolist() == [5, *range(10, 101, 10)]


def test_many_curves_are_grey_but_for_the_best(tmp_path):
    sweep = swept(tmp_path, grid(lora__r=map(str, range(1, 21))))
    figure = validation_curves(sweep)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 9
    assert texts[0].startswith(f"best: job {sweep.best.number} r=")
    assert texts[-1] == "12 more"
    assert len(lines_of(figure)) == 20


def test_a_job_without_curves_of_lightnings_is_passed_over(tmp_path):
    folder = write_sweep(tmp_path, grid(lora__r=["4", "8"]))
    (folder / "0" / "metrics.csv").write_text("time,val_loss\n1,2\n")
    assert len(lines_of(validation_curves(collect(folder)))) == 1


def test_a_report_does_not_fail_for_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "parallel_coordinates", lambda sweep: 1 / 0)
    with pytest.warns(UserWarning, match=r"parallel\.png could not be drawn: ZeroDivisionError"):
        made = draw_all(swept(tmp_path, grid(lora__r=RANKS, learning_rate=RATES)))
    assert "plots/val_loss_curves.png" in made
