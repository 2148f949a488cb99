"""The page of a run: what its template shows, from what the folder holds."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.reports.curves import Points
from lora_lightning.reports.page import render
from lora_lightning.reports.page.chart import Chart, Line, chart
from lora_lightning.reports.page.figures import facts, measured
from lora_lightning.reports.page.files import listed
from lora_lightning.reports.page.folder import ADVICE, INSIGHT, METRICS, Run, pairs_of, read_run
from lora_lightning.reports.page.heatmap import heatmaps
from lora_lightning.reports.page.settings import what_matters
from lora_lightning.reports.page.words import day, setting

_TITLES = {
    "tokens_per_second": "Tokens a second",
    "val_perplexity": "Validation perplexity",
    "grad_norm": "Gradient norm",
}
_LARGE = {"train_loss", "val_loss"}
_ELSEWHERE = "insight/"  # the grids of the layers show these
# What people look for in the folder, and what it is.
_FILES = {
    "adapter": "the adapter at the end",
    "checkpoints": "the best and the last checkpoint",
    "result.json": "figures",
    METRICS: "curves",
    "samples.md": "all that was written",
    INSIGHT: "layers over the steps",
    ADVICE: "advice",
    "config.yaml": "every setting",
    "train.log": "what was printed",
    "job.log": "what was printed",
}
_MISSING = {
    "result.json": "the figures of the end",
    METRICS: "the curves",
    "adapter": "the adapter",
}


@dataclass(frozen=True)
class Sample:
    """What the model wrote to one prompt, first and last."""

    prompt: str
    before: str | None
    after: str
    reference: str | None


def run_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from what a run has left in its folder.

    Raises:
        AdapterError: There is a ``report.html`` that is not ours.
    """
    run = read_run(Path(folder))
    overrides = [str(each) for each in run.result.get("overrides") or run.about.get("overrides") or ()]
    began, ended, samples = _samples(run.samples)
    settings = what_matters(run.config, overrides)
    return render.write(
        run.folder,
        "run.html.j2",
        title=str(run.config.get("name") or run.folder.name),
        run=run,
        subtitle=_subtitle(run),
        when=day(run.about["started"]) if isinstance(run.about.get("started"), (int, float)) else None,
        missing=[what for name, what in _MISSING.items() if not (run.folder / name).exists()],
        measured=measured(run),
        facts=facts(run),
        loss=_loss(run),
        charts=_charts(run),
        samples=samples,
        samples_began=began,
        samples_ended=ended,
        between=run.samples[1:-1],
        advice=_advice(run),
        adapted=_adapted(run),
        heatmaps=heatmaps(run.insight),
        insight_step=max((row.step for row in run.insight), default=0),
        insight_picture=_insight_picture(run),
        settings=settings,
        typed=any(each.given for group in settings for each in group.settings),
        command=run.about.get("command") or _command(overrides, run),
        environment=run.about.get("environment") or {},
        files=listed(run.folder, _FILES),
    )


def try_page(folder: str | os.PathLike[str]) -> Path | None:
    """The same where a run ends, which does not fail for its page: what went wrong is warned of, and None returned."""
    try:
        return run_page(folder)
    except Exception as error:  # whatever it is, the training is done and its products matter more
        warnings.warn(f"The page of {folder} could not be written: {error!r}", stacklevel=2)
        return None


def _subtitle(run: Run) -> str:
    """The run in a line: model, data, adapter."""
    model = (run.config.get("model") or {}).get("name")
    lora = run.config.get("lora") or {}
    parts = [str(model)] if model else []
    if lora.get("r"):
        targets = lora.get("target_modules")
        parts.append(f"LoRA r={lora['r']} on {', '.join(targets) if isinstance(targets, list) else targets}")
    return " · ".join(parts)


def _loss(run: Run) -> Chart | None:
    validated = list(run.curves.get("val_loss", []))
    before = run.result.get("val_loss_before")
    if isinstance(before, (int, float)):
        validated.insert(0, (0, float(before)))
    lines = [
        Line("training", "trained", run.curves.get("train_loss", []), smooth=True),
        Line("validation", "validated", validated, dots=True),
    ]
    return chart("Loss", lines, steps=run.steps)


def _charts(run: Run) -> list[Chart]:
    """Everything else that was measured over the steps, each by itself."""
    drawn = []
    for column, points in run.curves.items():
        if column in _LARGE or column.startswith(_ELSEWHERE) or len(points) < 2:
            continue
        validated = column.startswith("val_")
        line = Line(column, "validated" if validated else "plain", _with_start(run, column, points), dots=validated)
        drawn.append(chart(_title(column), [line], steps=run.steps))
    return [each for each in drawn if each is not None]


def _with_start(run: Run, column: str, points: Points) -> Points:
    before = run.result.get(f"{column}_before")
    return [(0, float(before)), *points] if isinstance(before, (int, float)) else points


def _title(column: str) -> str:
    if column.startswith("lr-"):
        return f"Learning rate ({column.removeprefix('lr-')})"
    return _TITLES.get(column) or column.replace("_", " ").replace("val ", "validation ").capitalize()


def _samples(times: list[dict[str, Any]]) -> tuple[str, str, list[Sample]]:
    """The titles of the first and the last time, and what was written then, side by side by prompt."""
    if not times:
        return "", "", []
    first, last = times[0], times[-1]
    found = [
        Sample(
            str(now.get("prompt")),
            None if last is first else before,
            str(now.get("written") or "(nothing)"),
            now.get("reference"),
        )
        for before, now in pairs_of(first, last)
    ]
    return str(first.get("title", "")), str(last.get("title", "")), found


def _advice(run: Run) -> list[dict[str, Any]] | None:
    """What the run's figures say about its settings; None where nobody has looked."""
    given = run.result.get("advice")
    if not isinstance(given, list):
        return None
    return [
        {
            "rule": str(each.get("rule") or ""),
            "severity": "warning" if each.get("severity") == "warning" else "hint",
            "sentence": str(each.get("sentence") or ""),
            "override": each.get("override"),
            "numbers": {
                str(name).replace("_", " "): f"{value:.4g}" if isinstance(value, float) else setting(value)
                for name, value in (each.get("numbers") or {}).items()
            },
        }
        for each in given
        if isinstance(each, dict)
    ]


def _adapted(run: Run) -> dict[str, Any] | None:
    """The table of the layers, with each line's share of what trains."""
    adapted = run.about.get("adapted")
    if not isinstance(adapted, dict) or not adapted.get("layers"):
        return None
    counts = [int(str(each.get("parameters", "0")).replace(",", "") or 0) for each in adapted["layers"]]
    whole = sum(counts) or 1
    layers = [each | {"share": 100 * count / whole} for each, count in zip(adapted["layers"], counts, strict=True)]
    return {
        "layers": layers,
        "trains": f"{adapted['trainable_parameters']:,}",
        "total": f"{adapted['total_parameters']:,}",
        "percent": f"{adapted['trainable_parameters'] / max(1, adapted['total_parameters']):.2%}".replace(
            "%", "\N{NO-BREAK SPACE}%"
        ),
    }


def _insight_picture(run: Run) -> str | None:
    png = run.folder / "insight.png"
    return render.picture(png) if png.is_file() and not heatmaps(run.insight) else None


def _command(overrides: list[str], run: Run) -> str | None:
    """The command of a run that has left no ``about.json``."""
    import shlex

    return shlex.join(["python", "scripts/train.py", *overrides]) if run.result else None
