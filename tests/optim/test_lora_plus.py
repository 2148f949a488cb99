"""LoRA+ against PEFT's, step by step."""

import peft.optimizers
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning import LoraConfigError
from lora_lightning.optim import fuse, lora_plus


@pytest.mark.parametrize("fused", [False, True])
def test_the_steps_are_those_of_peft(lab, fused):
    more = {"use_dora": True, "modules_to_save": ["head", "norm"]}
    model = lab.adapted(**more)
    other, names = lab.theirs_of(model, **more)
    ours = lora_plus(model, lr=1e-2, ratio=5.0, lr_embedding=3e-3, weight_decay=0.1)
    ours = fuse(ours, model) if fused else ours
    theirs = peft.optimizers.create_loraplus_optimizer(
        other,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=5.0,
        loraplus_lr_embedding=3e-3,
        loraplus_weight_decay=0.1,
    )
    for step in range(4):
        lab.train(model, ours, 1, step)
        lab.train(other, theirs, 1, step)
        lab.assert_equal(model, other, names, rtol=1e-9, atol=1e-11)
    assert all(bool(group["fused"]) is fused for group in ours.param_groups)


def test_a_schedule_scales_all_groups_alike(lab):
    model = lab.adapted()
    optimizer = lora_plus(model, lr=1e-2, ratio=4.0, lr_embedding=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    lab.train(model, optimizer, 1)
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"A": 5e-3, "B": 2e-2, "embeddings": 5e-4}
    )


def test_a_ratio_that_is_none_is_refused(lab):
    with pytest.raises(LoraConfigError, match="ratio"):
        lora_plus(lab.adapted(), ratio=0)
