"""One norm, against torch's own clipping, and steps of groups of mixed kinds, against one that is not split."""

import pytest
import torch
from torch import nn

from lora_lightning.optim.by_kind import join_groups, step_by_kind
from lora_lightning.optim.clip import clip_by_norm, clip_by_value
from lora_lightning.optim.gradients import are_finite, not_finite, without_gradient


def _parameters(dtype=torch.float32):
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 2), (5,), (2, 2, 2))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


@pytest.mark.parametrize("clip_val", [0.1, 1.0, 100.0])
def test_the_norm_and_the_gradients_are_torchs(clip_val):
    ours, theirs = _parameters(), _parameters()
    total = clip_by_norm(torch.optim.SGD(ours, lr=0.1), clip_val)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, clip_val)
    torch.testing.assert_close(total, wanted)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_nothing_to_clip_is_nothing():
    p = nn.Parameter(torch.ones(2))
    assert clip_by_norm(torch.optim.SGD([p], lr=0.1), 1.0) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_are_named(bad):
    named = dict(zip("abc", _parameters(), strict=True))
    assert not_finite(named) == []
    named["b"].grad[2] = bad
    named["c"].grad = None
    assert not_finite(named) == ["b"]
    assert without_gradient(named) == ["c"]


def test_groups_of_two_kinds_step_in_two_parts_and_are_whole_again(tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, wanted = _parameters(), _parameters()
        spread = nn.Parameter(DTensor.from_local(plain[1].data, mesh, [Replicate()]))
        spread.grad = DTensor.from_local(plain[1].grad, mesh, [Replicate()])
        mixed = [plain[0], spread, plain[2]]
        optimizer = torch.optim.AdamW(mixed, lr=0.1, foreach=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            optimizer.step()
        optimizer.state.clear()
        step_by_kind(optimizer)
        step_by_kind(optimizer)  # once is enough
        reference = torch.optim.AdamW(wanted, lr=0.1, foreach=True)
        for _ in range(3):
            assert clip_by_norm(optimizer, 0.5).item() == pytest.approx(clip_by_norm(reference, 0.5).item())
            optimizer.step()
            reference.step()
            scheduler.step()
            for group in reference.param_groups:
                group["lr"] *= 0.5
        assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], mixed, strict=True)] == [True] * 3
        for p, q in zip(mixed, wanted, strict=True):
            torch.testing.assert_close(p.full_tensor() if isinstance(p, DTensor) else p.data, q.data)

        def fails():
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            optimizer.step(fails)
        join_groups(optimizer)
        assert len(optimizer.param_groups) == 1
    finally:
        dist.destroy_process_group()


def test_norms_of_spread_tensors_are_those_of_whole_ones(processes):
    processes(
        """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from lora_lightning.injection.tensors import norms
from lora_lightning.optim.clip import clip_by_norm, clip_by_value

torch.manual_seed(0)
whole = [torch.randn(shape) * 1e3 for shape in ((5, 3), (1,), (4, 2), (3,), (6,))]
layouts = [Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], None
mesh = init_device_mesh("cpu", (world,))
sums = []
reduce = dist.all_reduce
dist.all_reduce = lambda *a, **k: (sums.append(1), reduce(*a, **k))
spread = [w.clone() if l is None else distribute_tensor(w.clone(), mesh, l) for w, l in zip(whole, layouts)]
torch.testing.assert_close(norms(spread), torch.stack([w.norm() for w in whole]))
assert sums == [1]
parameters = [torch.nn.Parameter(torch.zeros_like(t)) for t in spread]
optimizer = torch.optim.SGD(parameters, lr=1.0)
for p, g in zip(parameters, spread):
    p.grad = g
total = clip_by_norm(optimizer, 2.0)
expected = torch.stack([w.norm() for w in whole]).norm()
torch.testing.assert_close(total, expected)
clip_by_value(optimizer, 0.5)
for p, w in zip(parameters, whole):
    mine = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    torch.testing.assert_close(mine, (w * (2.0 / expected)).clamp(-0.5, 0.5))
"""
    )


def test_a_step_passes_over_the_gradients_a_fixed_number_of_times():
    """However many tensors an adapter has: no operation of its own for each, and nothing that waits for a device."""
    from torch.profiler import ProfilerActivity, profile

    def calls(count):
        parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(count)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            clip_by_norm(optimizer, 1.0)
            clip_by_value(optimizer, 1.0)
            are_finite(parameters)
        names = [event.name for event in seen.events() if event.cpu_parent is None]
        assert not any(name in ("aten::item", "aten::_local_scalar_dense") for name in names)
        return len(names)

    assert calls(420) == calls(2) < 20
