"""Each rule speaks on a case made for it, and is silent on one that only looks like it."""

import math
import shlex
from dataclasses import replace

import pytest

from lora_lightning import LoraConfig
from lora_lightning.reports.advice import Evidence, judge
from lora_lightning.reports.advice.curves import spikes
from lora_lightning.reports.insight import InsightRow

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def rows(r=16, used=0.8, stable=0.13, needed=12.0, step=60, blocks=4, kinds=KINDS, **fields):
    """Layers as a run leaves them: by default as the demo does, most of the rank used and most of it little."""
    fields = {"relative_norm": 0.05, "grad_norm_A": 0.1, "grad_norm_B": 0.2, "parameters": 1000} | fields
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]
    return [
        InsightRow(
            step, name, r, r, effective_rank=0.75 * r, stable_rank=stable * r, rank_used=used, rank_95=needed, **fields
        )
        for name in names
    ]


def falling(first, last, steps=60, every=5, wobble=0.05):
    """A curve that falls as a square root, with noise that is no noise so that it is the same each time."""
    at = range(every, steps + 1, every)
    return [(s, first - (first - last) * math.sqrt(s / steps) + wobble * math.sin(7 * s)) for s in at]


HEALTHY = Evidence(
    trained=falling(4.4, 2.5, wobble=0.3),
    validated=[(0, 4.41), (30, 2.6), (60, 2.53)],
    rows=rows(),
    config={
        "learning_rate": 1e-3,
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "task": {"_target_": "lora_lightning.tasks.CausalLM"},
    },
    result={"status": "finished", "overrides": []},
    adapter={"task_type": "CAUSAL_LM", "modules_to_save": None},
)
OVERFIT = [(0, 4.4), (20, 2.6), (40, 2.7), (60, 3.1)]


def with_lora(evidence, **fields):
    return replace(evidence, config={**evidence.config, "lora": {**evidence.config["lora"], **fields}})


def names(evidence):
    return [advice.rule for advice in judge(evidence)]


def the(rule, evidence):
    (found,) = [advice for advice in judge(evidence) if advice.rule == rule]
    return found


def test_a_healthy_run_is_left_alone():
    assert names(HEALTHY) == []
    assert names(Evidence()) == []


# ---- rank


def test_a_rank_that_all_layers_use_evenly_is_too_small():
    starved = with_lora(replace(HEALTHY, rows=rows(r=2, used=1.0, stable=0.6)), r=2, lora_alpha=4)
    advice = the("rank saturated", starved)
    assert (advice.severity, advice.override) == ("hint", "lora.r=8")
    assert "12 of 12 layers" in advice.sentence
    assert advice.numbers == {"layers": 12, "of": 12, "stable_rank": pytest.approx(1.2), "rank": 2}


def test_one_kind_of_layer_gets_a_pattern_with_its_scale():
    mixed = rows()[:9] + rows(used=1.0, stable=0.5)[9:]
    of_kind = [replace(row, rank_used=1.0, stable_rank=8.0) if "down_proj" in row.layer else row for row in rows()]
    assert "rank saturated" in names(replace(HEALTHY, rows=of_kind))
    advice = the("rank saturated", replace(HEALTHY, rows=of_kind))
    assert advice.override == "'+lora.rank_pattern={down_proj:32}' '+lora.alpha_pattern={down_proj:64}'"
    assert names(replace(HEALTHY, rows=mixed)) == []  # the last block is no kind


@pytest.mark.parametrize(
    "evidence",
    [
        replace(HEALTHY, rows=rows(r=16, used=1.0, stable=0.2)),  # all of it is used, most of it hardly
        replace(HEALTHY, rows=rows(r=16, used=0.8, stable=0.5)),  # some of it is not used
        replace(HEALTHY, rows=rows(r=2, used=1.0, stable=0.6), validated=OVERFIT),  # more would learn more by heart
        replace(HEALTHY, rows=[]),
    ],
)
def test_a_rank_that_suffices_is_not_raised(evidence):
    assert "rank saturated" not in names(evidence)


def test_a_rank_of_which_little_is_used_is_too_large():
    ample = with_lora(replace(HEALTHY, rows=rows(r=64, needed=11, stable=0.05)), r=64, lora_alpha=128)
    advice = the("rank unused", ample)
    assert advice.override == "lora.r=16"
    assert "11 of 64" in advice.sentence
    own_alpha = replace(ample, result={"overrides": ["lora.r=64", "lora.lora_alpha=128"]})
    assert the("rank unused", own_alpha).override == "lora.r=16 lora.lora_alpha=32"
    rslora = with_lora(own_alpha, use_rslora=True)
    assert the("rank unused", rslora).override == "lora.r=16 lora.lora_alpha=64"
    old = LoraConfig(r=64, lora_alpha=128, use_rslora=True).scaling()
    assert LoraConfig(r=16, lora_alpha=64, use_rslora=True).scaling() == old


@pytest.mark.parametrize(
    "layers",
    [
        rows(r=64, needed=33),
        rows(r=64, needed=8)[:9] + rows(r=64, needed=50)[9:],  # a quarter of the layers needs it
        rows(r=16, needed=1)[:6] + rows(r=32, needed=1)[6:],  # somebody has thought about it
        rows(r=16, needed=0),
    ],
)
def test_a_rank_that_is_needed_is_not_lowered(layers):
    assert "rank unused" not in names(with_lora(replace(HEALTHY, rows=layers), r=layers[0].r))


# ---- curves


def test_learning_by_heart():
    advice = the("overfitting", replace(HEALTHY, validated=OVERFIT))
    assert advice.severity == "warning"
    assert advice.override == "trainer.max_steps=20 lora.lora_dropout=0.1 lora.r=8"
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
    of_kind = [replace(row, rank_used=1.0, stable_rank=8.0) if "down_proj" in row.layer else row for row in rows()]
    still = rows()
    still[1] = replace(still[1], relative_norm=0.0)
    for evidence in (
        replace(HEALTHY, rows=of_kind),
        replace(HEALTHY, rows=still),
        replace(HEALTHY, validated=OVERFIT),
        with_lora(replace(HEALTHY, rows=rows(r=64, needed=7)), r=64),
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
