"""What the jobs of a finished sweep have left: their loss curves and results."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def jobs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The jobs of a sweep by number: ``overrides``, ``status``, ``ended_by``, ``val_loss``, ``losses`` by step."""
    jobs = {}
    for job in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["jobs"]:
        place = folder / job["folder"]
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        kept = {key: result.get(key) for key in ("status", "ended_by", "val_loss", "seconds")}
        jobs[str(job["number"])] = {"overrides": job["overrides"], **kept, "losses": losses(place / "metrics.csv")}
    return jobs


def losses(metrics: Path) -> dict[str, float]:
    """The training loss of each step that was logged."""
    with metrics.open(encoding="utf-8", newline="") as file:
        return {row["step"]: float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")}


def compared(jobs: Mapping[str, Mapping[str, Any]], solo: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """How far the jobs are from their solo runs, and which is the best of those that were trained to the end.

    Returns:
        ``best``, a job's number; and with solo runs ``difference``, the largest one between training losses at the same
        step, and ``val_difference``, between validation losses of jobs that both were trained to the end.

    Raises:
        RuntimeError: A job has no loss in common with its solo run, so that nothing was compared.
    """
    whole = {number: job for number, job in jobs.items() if job["status"] == "finished" and not job["ended_by"]}
    told: dict[str, Any] = {"best": min(whole, key=lambda number: whole[number]["val_loss"], default=None)}
    if solo is None:
        return told
    steps, ends = [], []
    for number, job in jobs.items():
        both = job["losses"].keys() & solo[number]["losses"].keys()
        if not both:
            raise RuntimeError(f"job {number} has logged no loss at a step at which its solo run has")
        steps += [abs(job["losses"][step] - solo[number]["losses"][step]) for step in both]
        if number in whole and not solo[number]["ended_by"]:
            ends.append(abs(job["val_loss"] - solo[number]["val_loss"]))
    return {**told, "difference": max(steps), "val_difference": max(ends, default=None)}
