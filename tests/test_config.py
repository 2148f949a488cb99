"""The config: checked as a whole, and its messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_lightning import LoraConfig, LoraConfigError


def test_defaults_are_pefts_but_for_the_targets():
    import peft

    ours, theirs = LoraConfig().to_dict(), peft.LoraConfig().to_dict()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing == {"target_modules"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -3}, "r must be at least 1, got -3"),
        ({"r": 2.5}, "whole number"),
        ({"r": "8"}, "whole number"),
        ({"r": True}, "whole number"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"lora_dropout": 1.0}, r"\[0, 1\)"),
        ({"bias": "lora"}, "did you mean lora_only"),
        ({"task_type": "CAUSALLM"}, "did you mean CAUSAL_LM"),
        ({"init_lora_weights": "gausian"}, "did you mean gaussian"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": ""}, "empty string"),
        ({"target_modules": None}, "target_modules must be a list of module names or a regular expression, got None"),
        ({"target_modules": "q_proj("}, "not a regular expression"),
        ({"target_modules": [1]}, "list of module names"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1"),
        ({"layers_to_transform": [1]}, "target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"rank": 8}, "it is called 'r'"),
        ({"alpha": 8}, "it is called 'lora_alpha'"),
        ({"dropout": 0.1}, "it is called 'lora_dropout'"),
        ({"lora_alfa": 8}, "did you mean lora_alpha"),
    ],
)
def test_each_mistake_is_told(values, message):
    with pytest.raises(LoraConfigError, match=message):
        LoraConfig.from_dict(values)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(LoraConfigError) as caught:
        LoraConfig.from_dict({"rank": 1, "r": 0, "bias": "x", "lora_dropout": 2})
    assert str(caught.value).count("\n  - ") == 4


def test_omegaconf_containers_become_plain_ones():
    config = LoraConfig.from_dict(
        OmegaConf.create({"r": 4, "lora_alpha": "${r}", "target_modules": ["a", "b"], "rank_pattern": {"a": 2}})
    )
    assert (type(config.target_modules), type(config.rank_pattern), config.lora_alpha) == (list, dict, 4)


@given(st.integers(1, 512), st.floats(0.1, 1000), st.booleans())
def test_scaling_equals_pefts(r, alpha, rslora):
    import peft
    from torch import nn

    config = LoraConfig(r=min(r, 16), lora_alpha=alpha, use_rslora=rslora)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(2, 2)),
        peft.LoraConfig(r=min(r, 16), lora_alpha=alpha, use_rslora=rslora, target_modules=["0"]),
    )
    assert config.scaling() == pytest.approx(model.base_model.model[0].scaling["default"])


def test_difference_names_fields():
    assert LoraConfig(r=4).difference(LoraConfig(r=8)) == ["r: 4 here, 8 there"]
