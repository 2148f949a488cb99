"""Each rule speaks on a case made for it, and is silent on one that only looks like it."""

import math
import shlex
from dataclasses import replace

import pytest

from lora_lightning import LoraConfig
from lora_lightning.reports.advice import Evidence, judge
from lora_lightning.reports.advice.curves import spikes
from lora_lightning.reports.insight import InsightRow
from tests.reports.advice.cases import HEALTHY, OVERFIT, falling, names, of_kind, rows, the, with_lora


def test_a_healthy_run_is_left_alone():
    assert names(HEALTHY) == []
    assert names(Evidence()) == []


# ---- curves


def test_learning_by_heart():
    advice = the("overfitting", replace(HEALTHY, validated=OVERFIT))
    assert advice.severity == "warning"
    assert advice.override == "trainer.max_steps=20"
    assert "more dropout (lora.lora_dropout=0.1) or a lower rank (lora.r=8 lora.lora_alpha=16)" in advice.sentence
    much = the("overfitting", replace(with_lora(HEALTHY, lora_dropout=0.3), validated=OVERFIT))
    assert "dropout" not in much.sentence
    assert advice.numbers["lowest_step"] == 20
    slight = [(0, 4.4), (20, 2.6), (40, 2.65), (60, 2.75)]
    assert the("overfitting", replace(HEALTHY, validated=slight)).severity == "hint"


@pytest.mark.parametrize(
    ("trained", "validated"),
    [
        (HEALTHY.trained, [(0, 4.4), (20, 2.6), (40, 2.62), (60, 2.61)]),  # up and down by noise
        (falling(2.5, 4.4), OVERFIT),  # training loss rises too: that is something else
        (HEALTHY.trained, [(0, 4.4), (60, 4.5)]),
        (HEALTHY.trained, [(0, 2.0), (30, 2.5), (60, 3.0)]),  # never any better
    ],
)
def test_not_learning_by_heart(trained, validated):
    assert "overfitting" not in names(replace(HEALTHY, trained=trained, validated=validated))


def test_a_learning_rate_at_the_edge():
    jumping = list(HEALTHY.trained)
    jumping[8] = (45, 9.0)
    advice = the("learning rate too high", replace(HEALTHY, trained=jumping))
    assert (advice.severity, advice.override) == ("hint", "learning_rate=0.0003")
    assert "at step 45" in advice.sentence
    broken = [*HEALTHY.trained[:-1], (60, math.nan)]
    assert the("learning rate too high", replace(HEALTHY, trained=broken)).severity == "warning"
    grown = the("learning rate too high", replace(HEALTHY, trained=falling(2.5, 4.4), validated=[]))
    assert grown.severity == "warning"
    assert grown.numbers["spikes"] == []


def test_noise_is_no_jump():
    noisy = falling(4.4, 2.5, wobble=0.8)
    assert spikes(noisy) == []
    small = [(step, 0.01 if step % 3 else 0.2) for step in range(1, 40)]  # a classifier that knows its rows
    small[0] = (1, 0.7)
    assert spikes(small) == []
    assert "learning rate too high" not in names(replace(HEALTHY, trained=noisy))
    assert "learning rate too high" not in names(replace(HEALTHY, trained=small))


def test_a_learning_rate_that_does_nothing():
    stuck = replace(HEALTHY, validated=[(0, 4.41), (60, 4.40)], rows=rows(relative_norm=1e-4))
    advice = the("learning rate too low", stuck)
    assert advice.override == "learning_rate=0.003"
    assert "0.01 %" in advice.sentence


@pytest.mark.parametrize("validated", [[(0, 4.41), (60, 4.2)], [(0, 4.41), (10, 4.41)], [(60, 4.41)], []])
def test_little_is_expected_of_few_steps_and_something_was_learned(validated):
    assert "learning rate too low" not in names(replace(HEALTHY, validated=validated))


def test_a_run_that_was_stopped_at_numbers_that_are_none():
    result = {"status": "failed", "steps": 6, "error": "NonFiniteError: the loss of step 7 is nan"}
    stopped = Evidence(trained=[(5, 6.4)], config=HEALTHY.config, result=result)
    (advice,) = judge(stopped)
    assert (advice.rule, advice.severity, advice.override) == (
        "learning rate too high",
        "warning",
        "learning_rate=0.0003",
    )
    assert "After 6 steps the loss or its gradients were not finite" in advice.sentence


@pytest.mark.parametrize(
    ("typed", "rate"),
    [
        (["lora=high_capacity"], ("learning_rate", 1e-3)),  # optimizer.lr is an eighth of it, by the scale
        (["optimizer=riemannian", "learning_rate=5e-4"], ("learning_rate", 5e-4)),
        (["optimizer=sgd"], ("optimizer.lr", 0.1)),
        (["optimizer=riemannian_sgd", "optimizer.lr=1"], ("optimizer.lr", 1.0)),
        (["optimizer.lr=1e-3"], ("optimizer.lr", 1e-3)),
    ],
)
def test_the_learning_rate_is_that_which_the_optimizer_had(composed, typed, rate):
    config = {key: value for key, value in composed(*typed).items() if key in ("learning_rate", "optimizer", "lora")}
    jumping = [(step, 9.0 if step == 45 else loss) for step, loss in HEALTHY.trained]
    evidence = Evidence(jumping, config=config, result={"overrides": typed})
    assert evidence.rate == rate
    advice = the("learning rate too high", evidence)
    setting, value = advice.override.split("=")
    assert (setting, float(value)) == (rate[0], pytest.approx(rate[1] / 3, rel=0.25))  # to one digit
    assert f"({rate[0]}={rate[1]:g})" in advice.sentence


def test_a_classifier_without_a_head():
    task = {"_target_": "lora_lightning.tasks.SequenceClassification"}
    adapter = {"task_type": "CAUSAL_LM", "modules_to_save": None}
    stuck = replace(HEALTHY, config={**HEALTHY.config, "task": task}, adapter=adapter)
    assert the("head does not train", stuck).severity == "hint"
    stuck = replace(stuck, validated=[(0, 1.61), (60, 1.60)])
    (advice,) = judge(stuck)  # and nothing of the learning rate
    assert (advice.severity, advice.override) == ("warning", "lora.task_type=SEQ_CLS")
    for well in ({"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM", "modules_to_save": ["classifier"]}, {}):
        assert "head does not train" not in names(replace(stuck, adapter=well))
    assert "head does not train" not in names(HEALTHY)


# ---- layers


def test_layers_that_stay_where_they_are():
    layers = rows()
    layers[1] = replace(layers[1], relative_norm=0.0, grad_norm_A=0.0, grad_norm_B=0.0, effective_rank=0.0)
    advice = the("layers that never moved", replace(HEALTHY, rows=layers))
    assert advice.override == "'lora.exclude_modules=[model.layers.0.self_attn.v_proj]'"
    assert "No gradient reaches them" in advice.sentence
    more = with_lora(replace(HEALTHY, rows=layers), exclude_modules=["lm_head"])
    assert the("layers that never moved", more).override.startswith("'lora.exclude_modules=[lm_head,")


def test_what_is_not_known_of_layers_that_stay_is_not_said():
    layers = rows(grad_norm_A=None, grad_norm_B=None)
    layers[1] = replace(layers[1], relative_norm=0.0)
    advice = the("layers that never moved", replace(HEALTHY, rows=layers))
    assert "gradient" not in advice.sentence
    most = [row if "mlp" in row.layer else replace(row, relative_norm=0.0) for row in rows()]
    assert "moved by 5 % of" in the("layers that never moved", replace(HEALTHY, rows=most)).sentence


def test_parameters_are_not_left_out_by_the_names_of_modules():
    layers = rows(kinds=("mlp.experts.gate_up_proj", "mlp.down_proj"))
    layers[0] = replace(layers[0], relative_norm=0.0)
    experts = with_lora(replace(HEALTHY, rows=layers), target_parameters=["experts.gate_up_proj"])
    assert the("layers that never moved", experts).override is None


@pytest.mark.parametrize("moved", [0.0, 0.003])
def test_all_alike_or_only_less_is_not_still(moved):
    layers = rows() if moved else rows(relative_norm=0.0)
    layers[1] = replace(layers[1], relative_norm=moved)
    assert "layers that never moved" not in names(replace(HEALTHY, rows=layers))


def test_targets_that_are_missing():
    others = [InsightRow(60, f"model.layers.{block}.mlp.up_proj", 0, parameters=3000) for block in range(4)]
    partly = with_lora(replace(HEALTHY, rows=rows() + others), target_modules=["q_proj", "v_proj", "down_proj"])
    advice = the("targets missing", partly)
    assert advice.override == "lora.target_modules=all-linear"
    assert "up_proj (×4)" in advice.sentence
    assert advice.numbers["share_of_weights"] == 0.5
    few = [replace(row, parameters=1000) for row in others]
    assert "targets missing" not in names(replace(partly, rows=rows() + few))
    assert "targets missing" not in names(with_lora(partly, exclude_modules=["up_proj"]))  # meant so
    assert "targets missing" not in names(replace(partly, validated=OVERFIT))


# ---- what is told


def every_override():
    still = rows()
    still[1] = replace(still[1], relative_norm=0.0)
    for evidence in (
        replace(HEALTHY, rows=of_kind("down_proj")),
        replace(HEALTHY, rows=still),
        replace(HEALTHY, validated=OVERFIT),
        with_lora(replace(HEALTHY, rows=rows(r=64, needed=7, half=0.01)), r=64),
    ):
        yield from (advice.override for advice in judge(evidence))


def test_overrides_are_such_as_the_command_line_takes(composed):
    told = list(every_override())
    assert len(told) == 4
    for override in told:
        LoraConfig.from_dict(composed(*shlex.split(override)).lora)
    given = composed("+lora.rank_pattern={q_proj:4,down_proj:16}", *shlex.split(told[0])).lora
    assert given.rank_pattern == {"q_proj": 4, "down_proj": 32}


def test_warnings_come_first():
    both = replace(HEALTHY, rows=rows(r=64, needed=7), validated=OVERFIT)
    assert [advice.severity for advice in judge(with_lora(both, r=64))] == ["warning", "hint"]
