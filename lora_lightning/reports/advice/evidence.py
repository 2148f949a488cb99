"""What a run has left behind that advice can go by."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_lightning.errors import AdapterError
from lora_lightning.reports.curves import Points, joined, parts_of
from lora_lightning.reports.insight.places import places_of
from lora_lightning.reports.insight.rows import InsightRow, latest, read_rows

FILES = ("metrics.csv", "insight.csv", "result.json", "config.yaml")
STEPS = 20
"""Of fewer steps nobody expects much."""
BARELY = 0.02
"""A loss that has fallen by less than this share of itself has barely moved."""
UNDERWAY = 0.1
"""A run whose second half has brought more than this share of all that its loss has fallen by ended on the way."""
_USUAL_SCALE = 2.0  # up to which ``optimizer.lr`` is ``learning_rate``, and beyond which it is less in proportion


@dataclass(frozen=True)
class Evidence:
    """The curves, the layers and the settings of one run, as plain data; each may be missing.

    Attributes:
        trained: Training loss over optimizer steps.
        validated: Validation loss over optimizer steps, that before the first one at step 0.
        rows: Of ``insight.csv``, all steps.
        config: Of ``config.yaml``.
        result: Of ``result.json``.
        adapter: Of the adapter's ``adapter_config.json``.
    """

    trained: Points = field(default_factory=list)
    validated: Points = field(default_factory=list)
    rows: list[InsightRow] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.trained or self.validated or self.rows)

    @cached_property
    def adapted(self) -> list[InsightRow]:
        """The layers with an adapter as they were at the end; those whose updates could be looked at."""
        return [row for row in latest(self.rows) if row.r and row.effective_rank is not None]

    @cached_property
    def left_out(self) -> list[InsightRow]:
        """The layers without one."""
        return [row for row in latest(self.rows) if not row.r]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind of each layer, by its name."""
        return {name: place.kind for name, place in places_of({row.layer for row in self.rows}).items()}

    @property
    def lora(self) -> Mapping[str, Any]:
        """The settings of the adapter: those of the run's configuration, else the saved adapter's."""
        return self.config.get("lora") or self.adapter

    @property
    def r(self) -> int | None:
        """The rank, where the settings or the layers tell one for all."""
        if isinstance(found := self.lora.get("r"), int):
            return found
        ranks = {row.r for row in self.adapted}
        return ranks.pop() if len(ranks) == 1 else None

    @property
    def rate(self) -> tuple[str, float] | None:
        """The setting that the learning rate went by, and its value.

        It is ``learning_rate``, or ``optimizer.lr`` where that was given itself or is an optimizer's own.
        """
        general, own = self.config.get("learning_rate"), (self.config.get("optimizer") or {}).get("lr")
        if isinstance(own, (int, float)) and (self.given("optimizer.lr") or not self._follows(own, general)):
            return "optimizer.lr", float(own)
        return ("learning_rate", float(general)) if isinstance(general, (int, float)) else None

    def _follows(self, own: float, general: object) -> bool:
        r, alpha = self.lora.get("r"), self.lora.get("lora_alpha")
        if not isinstance(general, (int, float)) or not (isinstance(r, int) and isinstance(alpha, (int, float))):
            return own == general
        scale = abs(alpha) / (math.sqrt(r) if self.lora.get("use_rslora") else r)
        return math.isclose(own, general * min(1.0, _USUAL_SCALE / scale) if scale else general, rel_tol=1e-6)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        seen = (step for step, *_ in (*self.trained, *self.validated))
        return max([int(self.result.get("steps") or 0), *seen, *(row.step for row in self.rows)])

    @property
    def fallen(self) -> float | None:
        """The share of itself by which validation loss (else training loss) has fallen; None if that is not known."""
        if len(self.validated) >= 2:
            first, last = self.validated[0][1], self.validated[-1][1]
        elif (ends := thirds(self.trained)) is not None:
            first, last = ends
        else:
            return None
        return (first - last) / abs(first) if first and math.isfinite(first - last) else None

    @property
    def is_underway(self) -> bool:
        """Whether validation loss was still on its way down: the second half brought more than a tenth of it all."""
        half = [loss for step, loss in self.validated if 0 < 2 * step <= self.steps]
        if not half:
            return False
        first, last = self.validated[0][1], self.validated[-1][1]
        return half[-1] - last > UNDERWAY * (first - last) > 0

    @property
    def has_learned(self) -> bool:
        """Whether what the adapters look like is what learning has made of them, as far as that is known."""
        return self.steps >= STEPS and (self.fallen is None or self.fallen >= BARELY)

    @property
    def overfits(self) -> bool:
        """Whether validation loss has risen from its lowest by more than a twentieth of what it had fallen by."""
        if len(self.validated) < 3:
            return False
        (_, first), (_, last) = self.validated[0], self.validated[-1]
        lowest = min(loss for _, loss in self.validated)
        return lowest < first and last - lowest > max(0.05 * (first - lowest), 0.005 * abs(lowest))

    def given(self, key: str) -> bool:
        """Whether a setting was given on the command line.

        Args:
            key: Its name, dotted.
        """
        return any(str(each).lstrip("+").partition("=")[0] == key for each in self.result.get("overrides") or ())


def evidence_of(folder: str | os.PathLike[str], result: Mapping[str, Any] | None = None) -> Evidence:
    """Read what there is in a run's folder.

    Args:
        folder: The run's folder.
        result: What ``result.json`` is going to say, while it is not yet written.

    Returns:
        What there is.

    Raises:
        AdapterError: If it is no run's folder, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        there = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
        raise AdapterError(
            f"{folder} is no run's folder: it has none of {', '.join(FILES)}. There is: {', '.join(there) or 'nothing'}"
        )
    try:
        if result is None:
            result = _json(folder / "result.json")
        config: Any = OmegaConf.to_container(OmegaConf.load(path)) if (path := folder / "config.yaml").is_file() else {}
        adapter = _json(folder / "adapter" / "adapter_config.json")
        trained, validated = joined(parts_of(folder / "metrics.csv"), "train_loss", "val_loss")
    except (ValueError, OSError, KeyError, YAMLError, OmegaConfBaseException) as error:
        raise AdapterError(f"a file of {folder} cannot be read: {error}") from error
    before = result.get("val_loss_before")
    if isinstance(before, (int, float)) and math.isfinite(before) and (not validated or validated[0][0] > 0):
        validated.insert(0, (0, float(before)))
    last, steps = result.get("val_loss"), result.get("steps")
    if isinstance(last, (int, float)) and isinstance(steps, int) and (not validated or validated[-1][0] < steps):
        validated.append((steps, float(last)))  # measured once the fit was over
    return Evidence(
        trained=trained,
        validated=validated,
        rows=read_rows(folder / "insight.csv"),
        config=config if isinstance(config, dict) else {},
        result=result,
        adapter=adapter,
    )


def thirds(points: Points) -> tuple[float, float] | None:
    """The medians of the first and of the last third of a curve, or None where it has too few points for that."""
    values = [value for _, value in points if math.isfinite(value)]
    third = len(values) // 3
    return (median(values[:third]), median(values[-third:])) if third >= 2 else None


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
