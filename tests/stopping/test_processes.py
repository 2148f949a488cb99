"""Several processes stop together, whoever got the signal, and none outlives one that died."""

from __future__ import annotations

import signal
import time

import pytest
import torch

TERM, INT, USR1, KILL, STOP = (
    int(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGSTOP)
)


@pytest.mark.parametrize(
    "send",
    [
        pytest.param([(1, 4, TERM, 1)], id="only the second process"),
        pytest.param([(0, 4, TERM, 1)], id="only the first process"),
        pytest.param([(0, 4, USR1, 1), (1, 4, TERM, 1)], id="both, two signals"),
        pytest.param([(0, 3, INT, 1), (1, 4, INT, 1)], id="Ctrl-C, at different steps"),
    ],
)
def test_all_stop_at_one_step_and_go_on_exactly(run, whole, send):
    cut = run(devices=2, send=send)
    assert cut.status == {INT: 1}.get(send[0][2], 143), cut.said
    assert cut.others == [0]
    assert cut.said.count("Stopped by") == 1
    step = min(at for _, at, _, _ in send) + 1
    assert torch.load(cut.stopped, weights_only=True)["global_step"] == step
    resumed = run(devices=2, ckpt=str(cut.stopped))
    assert resumed.status == 0, resumed.said
    for rank in (0, 1):
        assert resumed.same_as(whole(devices=2), rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_other(run, rank):
    """The limit of the process group is the strategy's; the loss of a connection is seen at once."""
    died = run(devices=2, limit=120, send=[(rank, 4, KILL, 1)])
    statuses = [died.status, *died.others]
    assert statuses[rank] == -KILL
    assert statuses[1 - rank] not in (0, -KILL), died.said


def test_a_process_that_hangs_ends_the_other_at_the_limit(run):
    began = time.monotonic()
    died = run(devices=2, limit=3, send=[(1, 4, STOP, 1)], release=1)
    assert died.status not in (0, -KILL), died.said
    assert time.monotonic() - began < 300
