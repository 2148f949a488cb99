"""Parameters by kind, and pairs by name."""

import pytest
import torch
from torch import nn

from lora_lightning import LoraConfig, LoraConfigError, inject_lora, parameter_groups
from lora_lightning.optim.groups import pairs


def _named(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


def test_every_kind_has_its_group(lab):
    model = lab.adapted(use_dora=True, modules_to_save=["head", "norm"])
    assert _named(model, parameter_groups(model)) == {
        "A": ["fc1.lora_A", "fc2.lora_A"],
        "B": ["fc1.lora_B", "fc2.lora_B"],
        "magnitude": ["emb.lora_magnitude", "fc1.lora_magnitude", "fc2.lora_magnitude"],
        "embeddings": ["emb.lora_A", "emb.lora_B"],
        "vectors": ["head.bias", "norm.bias", "norm.weight"],
        "in_full": ["head.weight"],
    }


def test_what_trains_outside_the_adapted_network_is_held_too(lab):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = lab.net()
            self.own = nn.Linear(2, 2)

    model = Around()
    inject_lora(model.net, LoraConfig(r=2, target_modules=["fc1"]))
    assert _named(model, parameter_groups(model)) == {
        "A": ["net.fc1.lora_A"],
        "B": ["net.fc1.lora_B"],
        "vectors": ["own.bias"],
        "in_full": ["own.weight"],
    }


def test_groups_say_what_their_kind_is_told_and_only_what_trains(lab):
    model = lab.adapted(target_modules=["fc1", "fc2"])
    model.fc1.lora_A.requires_grad_(False)
    groups = parameter_groups(model, B={"lr": 0.3, "weight_decay": 0.0}, embeddings={"lr": 5.0})
    assert [(group["name"], group.get("lr"), len(group["params"])) for group in groups] == [
        ("A", None, 1),
        ("B", 0.3, 2),
    ]


def test_wrong_kinds_and_models_are_told(lab):
    with pytest.raises(LoraConfigError, match=r"'magnitudes' \(did you mean magnitude\?\)"):
        parameter_groups(lab.adapted(), magnitudes={"lr": 1})
    frozen = lab.net().requires_grad_(False)
    with pytest.raises(LoraConfigError, match="after injection"):
        parameter_groups(frozen)
    with pytest.raises(LoraConfigError, match="has no adapter"):
        pairs(lab.net())


def test_pairs_are_those_of_the_layers_and_know_scale_and_kind(lab):
    model = lab.adapted(rank_pattern={"fc2": 2}, alpha_pattern={"fc2": 8})
    found = pairs(model)
    assert list(found) == ["emb.lora_A", "fc1.lora_A", "fc2.lora_A"]
    assert [(p.scaling, p.is_embedding) for p in found.values()] == [(2.0, True), (2.0, False), (4.0, False)]
    assert found["fc2.lora_A"].a is model.fc2.lora_A
    assert found["fc2.lora_A"].b is model.fc2.lora_B


@pytest.mark.parametrize("groups", [1, 2])
def test_the_matrices_of_a_convolution_multiply_to_its_update(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=groups).double())
    inject_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    (pair,) = pairs(model).values()
    a, b = pair.a_matrices(pair.a), pair.b_matrices(pair.b)
    assert len(a) == len(b) == groups
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = nn.functional.conv2d(x, model[0].weight, model[0].bias, groups=groups)
    update = nn.functional.conv2d(x, (b @ a).reshape(6, 4, 3, 2))  # A sees all channels, B its group's rows of it
    torch.testing.assert_close(model(x), before + pair.scaling * update)
    torch.testing.assert_close(pair.as_b(b), pair.b.detach())


def test_the_matrices_of_experts_are_each_experts(lab):
    from lora_lightning.optim.groups import Pair

    a, b = torch.randn(3 * 2, 5), torch.randn(4, 2 * 3)  # three experts of rank 2, 5 to 4
    pair = Pair(nn.Parameter(a), nn.Parameter(b), 1.0, experts=3)
    for expert, (left, right) in enumerate(zip(pair.b_matrices(b), pair.a_matrices(a), strict=True)):
        torch.testing.assert_close(right, a[2 * expert : 2 * expert + 2])
        torch.testing.assert_close(left, b.view(4, 2, 3)[:, :, expert])
    torch.testing.assert_close(pair.as_b(pair.b_matrices(b)), b)
