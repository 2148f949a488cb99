from __future__ import annotations

import pytest
import torch

from lora_lightning.tasks.free_memory import free_memory


def test_a_containers_limit_counts(tmp_path):
    whole = free_memory(torch.device("cpu"), tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert free_memory(torch.device("cpu"), tmp_path) == 450000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu"), tmp_path) == pytest.approx(whole, rel=0.5)
