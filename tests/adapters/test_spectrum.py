"""The spectrum of an update, against the dense product of each kind of layer decomposed by numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.adapters.spectrum import (
    Factors,
    effective_rank,
    factors_of,
    spectra,
    spectrum_of,
    stable_rank,
    update_svd,
    used_rank,
)
from lora_lightning.injection.state import lora_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 9)
        self.turned = Conv1D(7, 9)
        self.conv1 = nn.Conv1d(7, 5, 3)
        self.conv2 = nn.Conv2d(7, 5, (3, 2))
        self.conv3 = nn.Conv3d(4, 5, 2)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.plain = nn.Linear(4, 4)


class Experts(nn.Module):
    def __init__(self, shape, transposed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.is_transposed = transposed


def injected(module, dtype=torch.float64, **config):
    torch.manual_seed(0)
    module = module.to(dtype)
    inject_lora(module, LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    with torch.no_grad():
        for _, layer in lora_layers(module):
            for value in layer.lora_own.values():
                value.copy_(torch.randn(value.shape))
    return dict(lora_layers(module))


def by_numpy(updates, rank):
    """The same numbers from the dense updates, a matrix each."""
    sigmas = [np.linalg.svd(update.detach().double().numpy(), compute_uv=False)[:rank] for update in updates]
    shares = [sigma / sigma.sum() for sigma in sigmas]
    lesser = [np.sum(np.repeat(sigma, 2)[len(sigma) :] ** 2) / 2 / np.sum(sigma**2) for sigma in sigmas]
    energies = [np.cumsum(sigma**2) / np.sum(sigma**2) for sigma in sigmas]
    return {
        "rank": rank,
        "effective_rank": np.mean([math.exp(-sum(p * math.log(p) for p in share if p > 0)) for share in shares]),
        "stable_rank": np.mean([np.sum(sigma**2) / sigma[0] ** 2 for sigma in sigmas]),
        "used": np.mean([1 + np.sum(energy < 0.99) for energy in energies]),
        "used_95": np.mean([1 + np.sum(energy < 0.95) for energy in energies]),
        "lesser_half": np.mean(lesser),
        "norm": math.sqrt(sum(np.sum(sigma**2) for sigma in sigmas)),
    }


TARGETS = ["embed", "linear", "turned", "conv1", "conv2", "conv3", "attention", "attention.out_proj"]


def test_every_kind_as_its_dense_update():
    layers = injected(Net(), target_modules=TARGETS, rank_pattern={"linear": 2, "conv2": 3})
    assert sorted(layers) == sorted(TARGETS)  # and nothing of the layer that has no adapter
    for name, layer in layers.items():
        dense = layer.lora_weight_delta()
        dense = dense.flatten(1) if dense.ndim > 2 else dense
        expected = by_numpy([dense], {"linear": 2, "conv2": 3}.get(name, 4))
        assert vars(spectrum_of(layer)) == pytest.approx(expected, rel=1e-9), name


def test_groups_of_a_convolution_are_updates_of_their_own():
    layer = injected(Net(), target_modules=["grouped"])["grouped"]
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    # The update as the layer applies it: its outputs for every unit input.
    units = torch.eye(72, dtype=torch.float64).view(72, 8, 3, 3)
    dense = layer.lora_delta(units).flatten(1).t()  # (out, in · k²)
    assert torch.allclose(dense @ x.flatten(), layer.lora_delta(x).flatten())
    assert vars(spectrum_of(layer)) == pytest.approx(by_numpy(dense.chunk(2), 2), rel=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_updates_of_their_own(transposed):
    model = nn.ModuleDict({"experts": Experts((3, 7, 5), transposed)})
    (layer,) = injected(model, target_modules=[], target_parameters=["experts.weight"]).values()
    expected = by_numpy(layer.lora_weight_delta(), 4)
    assert vars(spectrum_of(layer)) == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():  # an expert that no token has come to counts for nothing
        layer.lora_B.unflatten(1, (-1, 3))[..., 1] = 0
    expected = by_numpy(layer.lora_weight_delta()[[0, 2]], 4)
    assert vars(spectrum_of(layer)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_factors_are_read_exactly(dtype):
    layer = injected(Net(), target_modules=["linear"])["linear"].to(dtype)
    a, b = layer.lora_A.double(), layer.lora_B.double()
    assert vars(spectrum_of(layer)) == pytest.approx(by_numpy([layer.lora_scaling * (b @ a)], 4), rel=1e-9)


def test_dora_is_told_by_its_product():
    layer = injected(Net(), target_modules=["linear"], use_dora=True)["linear"]
    product = layer.lora_scaling * (layer.lora_B @ layer.lora_A)
    assert vars(spectrum_of(layer)) == pytest.approx(by_numpy([product], 4), rel=1e-9)


def test_a_start_that_changes_the_base_is_no_update():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    before = model[0].weight.detach().clone()
    inject_lora(model, LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"]))
    layer = dict(lora_layers(model))["0"]
    assert spectrum_of(layer).norm == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        layer.lora_A.add_(torch.randn_like(layer.lora_A))
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    update = layer.weight + layer.lora_weight_delta() - before
    assert vars(spectrum_of(layer)) == pytest.approx(by_numpy([update], 6), rel=1e-7)


@pytest.mark.parametrize(("out", "r", "n_in", "scaling"), [(9, 4, 7, 0.5), (3, 8, 5, 2.0), (6, 2, 4, -1.5)])
def test_svd_is_that_of_the_product(out, r, n_in, scaling):
    torch.manual_seed(1)
    a, b = torch.randn(2, r, n_in), torch.randn(2, out, r)
    u, sigma, vt = update_svd(a, b, scaling)
    product = scaling * (b.double() @ a.double())
    eye = torch.eye(sigma.shape[-1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(u * sigma[:, None] @ vt, product)
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(vt @ vt.mT, eye)
    k = min(out, r, n_in)
    torch.testing.assert_close(sigma[:, :k], torch.linalg.svdvals(product)[:, :k])


def test_no_update_has_no_rank():
    layer = injected(Net(), target_modules=["linear"])["linear"]
    nn.init.zeros_(layer.lora_B)
    assert vars(spectrum_of(layer)) == dict.fromkeys(vars(spectrum_of(layer)), 0) | {"rank": 4}
    assert spectrum_of(layer).rank_used == 0


def test_rank_one_in_a_large_budget():
    a, b = torch.zeros(1, 16, 20), torch.zeros(1, 30, 16)
    a[0, 0], b[0, :, 0] = torch.randn(20), torch.randn(30)
    (found,) = spectra({"x": Factors(a, b, 2.0)}).values()
    assert (found.effective_rank, found.stable_rank, found.used) == pytest.approx((1, 1, 1), abs=1e-6)
    assert found.rank_used == pytest.approx(1 / 16)


def test_very_small_and_very_large_updates_have_the_same_ranks():
    sigma = torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64)
    for factor in (1e-160, 1.0, 1e150):
        scaled = sigma * factor
        assert used_rank(scaled).item() == 2
        assert stable_rank(scaled).item() == pytest.approx(1 + 4 / 9 + 0.01 / 9)
        assert effective_rank(scaled).item() == pytest.approx(effective_rank(sigma).item())


def test_several_layers_at_once_as_each_by_itself():
    layers = injected(Net(), target_modules=TARGETS, rank_pattern={"linear": 2})
    together = spectra({name: factors_of(layer) for name, layer in layers.items()})
    assert list(together) == list(layers)
    for name, layer in layers.items():
        assert vars(together[name]) == pytest.approx(vars(spectrum_of(layer)))
