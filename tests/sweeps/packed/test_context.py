from __future__ import annotations

import io
import os
import random
import sys

import numpy as np
import pytest
import rich
import torch

from lora_lightning.sweeps.packed.context import Context, Global
from lora_lightning.sweeps.packed.output import OUTPUT, Routed


def draw() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def alone(number: int) -> list[list[float]]:
    seed(number)
    return [draw() for _ in range(3)]


def test_jobs_draw_what_they_would_draw_alone():
    expected = {number: alone(number) for number in range(3)}
    contexts = {number: Context() for number in expected}
    for number, context in contexts.items():
        with context:
            seed(number)
    seed(99)
    drawn = {number: [] for number in contexts}
    for _ in range(3):
        for number, context in contexts.items():
            with context:
                drawn[number].append(draw())
    assert drawn == expected
    assert draw() == alone(99)[0]  # and nothing of that is seen outside


def test_what_is_drawn_for_a_job_outside_of_its_turn_counts_as_drawn_by_it():
    seed(5)
    expected = [torch.rand(()).item() for _ in range(4)]
    context = Context()
    with context:
        seed(5)
        found = [torch.rand(()).item()]
    for _ in range(2):
        torch.manual_seed(0)
        with context.drawing(torch.device("cpu")):
            found.append(torch.rand(()).item())
    with context:
        found.append(torch.rand(()).item())
    assert found == expected


def test_a_job_has_its_own_seed_variables_and_number(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    contexts = [Context(LORA_LIGHTNING_JOB=str(number)) for number in range(2)]
    for number, context in enumerate(contexts):
        with context:
            assert "PL_GLOBAL_SEED" not in os.environ
            os.environ["PL_GLOBAL_SEED"] = f"{number + 10}"
    for number, context in enumerate(contexts):
        with context:
            assert os.environ["PL_GLOBAL_SEED"] == f"{number + 10}"
            assert os.environ["LORA_LIGHTNING_JOB"] == str(number)
    assert "PL_GLOBAL_SEED" not in os.environ
    assert "LORA_LIGHTNING_JOB" not in os.environ


def test_the_default_dtype_of_a_step_is_that_of_its_job():
    context = Context()
    with context:
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() == torch.float32
    with context.computing():
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32
    with context:
        torch.set_default_dtype(torch.float32)


def test_each_job_prints_to_its_own_screen(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Routed(own))
    screens = [io.StringIO(), io.StringIO()]
    contexts = [Context(screen) for screen in screens]
    print("before")
    for context in contexts:
        with context:
            print("hello")
            rich.get_console().print("from rich")
    print("after")
    assert own.getvalue() == "before\nafter\n"
    assert [screen.getvalue() for screen in screens] == ["hello\nfrom rich\n"] * 2
    assert OUTPUT.screen is None


def test_jobs_have_a_rich_console_each():
    consoles = []
    for context in [Context(), Context()]:
        with context:
            consoles.append(rich.get_console())
    assert consoles[0] is not consoles[1]


def test_more_may_be_a_jobs_own():
    box = {"value": "outside"}
    kept = Global(lambda: box["value"], lambda value: box.update(value=value))
    context = Context(more=(kept,))
    with context:
        box["value"] = "inside"
    assert box["value"] == "outside"
    with context:
        assert box["value"] == "inside"


def test_the_process_is_as_it_was_after_an_error():
    context = Context(LORA_LIGHTNING_JOB="7")
    with pytest.raises(RuntimeError, match="no"), context:
        raise RuntimeError("no")
    assert "LORA_LIGHTNING_JOB" not in os.environ


@pytest.mark.gpu
def test_jobs_draw_on_a_gpu_what_they_would_draw_alone():
    device = torch.device("cuda", 0)
    torch.manual_seed(3)
    expected = [torch.rand((), device=device).item() for _ in range(3)]
    context = Context()
    with context:
        torch.manual_seed(3)
        found = [torch.rand((), device=device).item()]
    torch.manual_seed(8)
    with context.drawing(device):
        found.append(torch.rand((), device=device).item())
    with context:
        found.append(torch.rand((), device=device).item())
    assert found == expected
