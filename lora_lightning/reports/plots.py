"""The picture of a run: how the losses fell."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lora_lightning.reports.curves import Points, joined, smoothed

_TRAINED, _VALIDATED = "#4878b6", "#d1495b"


def loss_picture(
    metrics_csv: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    val_loss_before: float | None = None,
    earlier: Sequence[str | os.PathLike[str]] = (),
) -> Path | None:
    """Draw training and validation loss over the optimizer steps.

    Args:
        metrics_csv: What Lightning's CSVLogger wrote: columns ``step``, ``train_loss``, ``val_loss``.
        png: Where to put the picture.
        val_loss_before: The validation loss before the first step, which the file does not hold.
        earlier: Such files of the parts of this run before it was resumed, oldest first.

    Returns:
        The picture's path, or None where there was nothing to draw or drawing failed: a run does not fail for its
        picture.
    """
    try:
        files = [*map(Path, earlier), Path(metrics_csv)]
        trained, validated = joined(files, "train_loss", "val_loss")
        if val_loss_before is not None:
            validated.insert(0, (0, val_loss_before))
        return _draw(trained, validated, Path(png)) if trained or validated else None
    except Exception as error:  # whatever it is, the training is done and its products matter more
        rank_zero_warn(f"The loss picture {png} could not be drawn: {error}")
        return None


def _draw(trained: Points, validated: Points, png: Path) -> Path:
    # The object interface: pyplot would keep the figure and might look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color=_TRAINED, alpha=0.4, linewidth=1)
        axes.plot(steps, smoothed(losses), color=_TRAINED, linewidth=2, label="training (smoothed)")
    if validated:
        steps, losses = zip(*validated, strict=True)
        axes.plot(steps, losses, color=_VALIDATED, marker="o", markersize=5, linewidth=1.5, label="validation")
        for index in {0, len(losses) - 1}:
            axes.annotate(
                f"{losses[index]:.2f}",
                (steps[index], losses[index]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=_VALIDATED,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.margins(x=0.04, y=0.1)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
    return png
