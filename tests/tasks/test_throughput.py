import pytest
import torch

from lora_lightning.tasks import throughput
from lora_lightning.tasks.throughput import Throughput


def test_counts_training_time_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Throughput()
    meter.pause()
    meter.resume()
    meter.add(torch.tensor(1000.0))  # the first step: warming up
    assert meter.rate is None
    now[0] += 2.0
    meter.add(torch.tensor(30.0))
    now[0] += 1.0
    meter.pause()
    now[0] += 50.0  # a validation
    meter.resume()
    now[0] += 1.0
    meter.add(torch.tensor(50.0))
    assert float(meter.rate) == pytest.approx((30 + 50) / (2 + 2))
