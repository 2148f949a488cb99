"""Folders of sweeps as they are left behind, made without training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lightning.sweeps.manifest import Entry, Manifest

COMMON = ("experiment=smoke",)


def write_sweep(folder: Path, jobs: Sequence[dict[str, Any]], **facts: Any) -> Path:
    """A sweep's folder.

    Args:
        folder: Where.
        jobs: For each job `overrides`, and where it has left such a thing `result` (beside what all jobs report),
            `curve` (validation losses), `adapter` (its bytes), `config` (text), `log`, `progress`, `same_as`.
        **facts: Of the manifest.
    """
    entries = [
        Entry(number, (*COMMON, *job["overrides"]), str(number), job.get("same_as")) for number, job in enumerate(jobs)
    ]
    known = {
        "name": folder.name,
        "command": ("scripts/train.py", "-m", *COMMON, "lora.r=4,8"),
        "script": "scripts/train.py",
        "config_name": "train",
        "overrides": (*COMMON, "lora.r=4,8"),
        "metric": "val_loss",
        "mode": "min",
        "sweeper": "BasicSweeper",
        "launcher": "LoraLocal",
        "started": 0.0,
        "version": "0",
    }
    Manifest(**known | facts, jobs=tuple(entries)).write(folder)
    for entry, job in zip(entries, jobs, strict=True):
        write_job(folder / entry.folder, entry.overrides, job)
    return folder


def write_job(place: Path, overrides: Sequence[str], job: dict[str, Any]) -> None:
    result = job.get("result")
    if result is not None:
        place.mkdir(parents=True, exist_ok=True)
        common = {"status": "finished", "overrides": list(overrides), "trainable_parameters": 1000, "seconds": 1.5}
        if "adapter" in job:
            (place / "adapter").mkdir(exist_ok=True)
            (place / "adapter" / "adapter_config.json").write_text("{}")
            (place / "adapter" / "adapter_model.safetensors").write_bytes(job["adapter"])
            common["adapter_path"] = str(place / "adapter")
        (place / "result.json").write_text(json.dumps(common | result))
    for name, key in {"config.yaml": "config", "job.log": "log", "progress.json": "progress"}.items():
        if key in job:
            place.mkdir(parents=True, exist_ok=True)
            text = job[key] if isinstance(job[key], str) else json.dumps(job[key])
            (place / name).write_text(text)
    if "curve" in job:
        lines = [f"{step - 1},,{loss}" for step, loss in job["curve"]]
        (place / "metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *lines]) + "\n")


def believable(overrides: Sequence[str], **result: Any) -> dict[str, Any]:
    """A job whose loss depends on its settings as that of a real one does, with a curve."""
    settings = dict(each.split("=") for each in overrides)
    noise = random.Random(repr(overrides))
    rate, rank = float(settings.get("learning_rate", 1e-3)), float(settings.get("lora.r", 16))
    away = math.log10(rate / 1e-3)
    end = 2.5 + 0.25 * away**2 - 0.04 * math.log2(rank) + noise.gauss(0, 0.015)
    end += {"attention": 0.1}.get(settings.get("lora.target_modules", ""), 0)
    curve = [(step, end + 2 * math.exp(-step / 15 * 10**away) + noise.gauss(0, 0.01)) for step in range(10, 101, 10)]
    loss = curve[-1][1]
    facts = {"val_loss": loss, "perplexity": math.exp(loss), "steps": 100, "peak_memory_bytes": 2**30, "seed": 0}
    return {"overrides": list(overrides), "result": facts | result, "curve": curve, "adapter": repr(overrides).encode()}
