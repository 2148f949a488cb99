import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.layers import chunks
from lora_lightning.layers.chunks import chunk_rows, free_bytes

CPU = torch.device("cpu")


@given(rows=st.integers(0, 10**6), row_bytes=st.integers(1, 10**9))
def test_chunks_fit_and_are_even(rows, row_bytes):
    at_once = chunk_rows(rows, row_bytes, CPU)
    assert 1 <= at_once <= max(rows, 1)
    assert at_once == 1 or at_once * row_bytes <= chunks.MOST_BYTES["cpu"]
    count = -(-max(rows, 1) // at_once)
    assert count == 1 or count * at_once - rows < count  # no chunk is shorter than the others by more than a row or so


def test_little_memory_makes_small_chunks(monkeypatch):
    assert chunk_rows(1000, 2**20, CPU) == 250  # 4 chunks of at most 256
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 64 * 2**20)
    assert chunk_rows(1000, 2**20, CPU) == 8
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 0)
    assert chunk_rows(1000, 2**20, CPU) == 1


def test_free_memory():
    assert 2**20 < free_bytes(CPU) < 2**50


@pytest.mark.gpu
def test_free_memory_of_a_gpu():
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= free_bytes(device) <= total
