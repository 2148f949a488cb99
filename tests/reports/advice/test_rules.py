"""Each rule speaks on a case made for it, and is silent on one that only looks like it."""

import math
import shlex
from dataclasses import replace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.adapters.spectrum import spectrum_of
from lora_lightning.reports.advice import Evidence, judge
from lora_lightning.reports.advice.curves import spikes
from lora_lightning.reports.insight import InsightRow
from lora_lightning.reports.insight.measure import names_below, watched_layers
from lora_lightning.reports.insight.places import places_of

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def rows(r=16, half=0.08, needed=10.0, step=60, blocks=4, kinds=KINDS, **fields):
    """Layers as a run leaves them: by default as the demo does, with most of the rank used and most of it little."""
    known = {"effective_rank": 0.75 * r, "relative_norm": 0.05, "grad_norm_A": 0.1, "grad_norm_B": 0.2}
    known |= {"parameters": 1000, "rank_95": needed, "lesser_half": half} | fields
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]
    return [InsightRow(step, name, r, r, **known) for name in names]


def of_kind(kind, layers=None, half=0.3):
    """The same layers, those of a kind short of rank."""
    return [replace(row, lesser_half=half) if row.layer.endswith(kind) else row for row in layers or rows()]


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


def test_a_rank_whose_lesser_half_holds_much_is_too_small():
    starved = with_lora(replace(HEALTHY, rows=rows(r=2, half=0.4, needed=2)), r=2, lora_alpha=4)
    advice = the("rank saturated", starved)
    assert (advice.severity, advice.override) == ("hint", "lora.r=8 lora.lora_alpha=16")
    assert "12 of 12 layers" in advice.sentence
    assert "holds 40 % of the update" in advice.sentence
    assert advice.numbers == {"layers": 12, "of": 12, "lesser_half": pytest.approx(0.4), "rank": 2}


def test_one_kind_of_layer_gets_a_pattern_with_its_scale():
    advice = the("rank saturated", replace(HEALTHY, rows=of_kind("down_proj")))
    assert advice.override == "'+lora.rank_pattern={down_proj:32}' '+lora.alpha_pattern={down_proj:64}'"
    low = with_lora(replace(HEALTHY, rows=of_kind("down_proj", rows(r=4))), r=4, lora_alpha=8)
    assert the("rank saturated", low).override == "lora.r=16 lora.lora_alpha=32"  # where a rank costs next to nothing
    head = replace(rows(r=4)[0], layer="lm_head", lesser_half=0.3)  # one layer says nothing of all
    low = with_lora(replace(HEALTHY, rows=[*rows(r=4), head]), r=4, lora_alpha=8)
    assert the("rank saturated", low).override == "'+lora.rank_pattern={lm_head:16}' '+lora.alpha_pattern={lm_head:32}'"
    last_block = rows()[:9] + rows(half=0.3)[9:]
    assert names(replace(HEALTHY, rows=last_block)) == []  # which is no kind


@pytest.fixture(scope="module")
def t5():
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=50)
    return lambda: T5ForConditionalGeneration(config)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.gate_up = torch.nn.Parameter(torch.randn(2, 32, 32))
        self.up, self.down = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.attention = torch.nn.MultiheadAttention(32, 2)


@pytest.mark.parametrize(
    ("short", "targets", "parameters", "given"),
    [
        ("decoder.block.0.layer.0.SelfAttention.q", ["q", "v"], None, {}),
        ("decoder.block.0.layer.0.SelfAttention.q", ["q", "v"], None, {"v": 4}),
        ("experts.gate_up", ["up", "down"], ["experts.gate_up"], {}),
        ("attention.out_proj", ["up", "down", "attention", "attention.out_proj"], None, {}),
    ],
)
def test_a_pattern_is_one_that_the_layers_take(composed, t5, short, targets, parameters, given):
    """Of a model with such an adapter, the kind of one layer is short; what is told is done, and only that moves."""

    def adapted(**patterns):
        model = t5() if "decoder" in short else Experts()
        config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, target_parameters=parameters, **patterns)
        inject_lora(model, config)
        layers = watched_layers(model)
        return {meant: layers[name] for name, meant in names_below(model, list(layers)).items()}

    before = adapted(rank_pattern=given)
    kind = places_of(before)[short].kind
    layers = [replace(rows()[0], layer=name, r=each.lora_r, rank=each.lora_r) for name, each in before.items()]
    layers = [replace(row, lesser_half=0.3 if places_of(before)[row.layer].kind == kind else 0.0) for row in layers]
    evidence = with_lora(replace(HEALTHY, rows=layers), rank_pattern=given)
    told = the("rank saturated", evidence).override
    lora = composed(*[f"+lora.rank_pattern.{key}={rank}" for key, rank in given.items()], *shlex.split(told)).lora
    after = adapted(rank_pattern=dict(lora.rank_pattern), alpha_pattern=dict(lora.alpha_pattern))
    for row in layers:
        moved = row.lesser_half or (short.startswith("attention") and row.layer == "attention")  # adapted as a whole
        assert after[row.layer].lora_r == (32 if moved else row.r), row.layer
        assert after[row.layer].lora_scaling == before[row.layer].lora_scaling, row.layer


def test_a_pattern_that_would_have_no_effect_is_not_told():
    many = replace(HEALTHY, rows=of_kind("down_proj", rows(blocks=60)))
    hidden = with_lora(many, rank_pattern={r"mlp\.down_proj|q_proj": 16})  # which is found first
    assert "down_proj: 32" in the("rank saturated", hidden).sentence
    assert the("rank saturated", hidden).override is None


def wanted_spectrum(r, wanted, steps=200):
    """A linear layer trained at a rank towards an update whose singular values are known; its layer after that."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q[:, : len(wanted)] for _ in range(2))
    net = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    target = net[0].weight.detach() + u * torch.tensor(wanted) @ v.T
    inject_lora(net, LoraConfig(r=r, lora_alpha=2 * r), seed=0)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        x = torch.randn(64, 64, generator=generator)
        noise = 0.5 * torch.randn(64, 64, generator=generator)
        loss = (net(x) - x @ target.T - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spectrum = spectrum_of(net[0])
    return rows(r, spectrum.lesser_half, spectrum.used_95, effective_rank=spectrum.effective_rank)


EVEN, LONG, SHORT_ONE = [1.0] * 8, [3 * n**-0.5 for n in range(1, 65)], [4.0 * n**-2 for n in range(1, 65)]


@pytest.mark.parametrize(
    ("r", "wanted", "said"),
    [
        (2, EVEN, ["rank saturated"]),
        (4, EVEN, ["rank saturated"]),
        (32, EVEN, ["rank unused"]),
        (2, LONG, ["rank saturated"]),
        (4, LONG, ["rank saturated"]),
        (2, SHORT_ONE, []),
        (2, [4.0], []),
        (1, EVEN, []),  # one direction tells nothing of a second
        (1, [4.0], []),
    ],
)
def test_what_a_layer_learned_says_whether_it_wanted_more(r, wanted, said):
    evidence = with_lora(replace(HEALTHY, rows=wanted_spectrum(r, wanted)), r=r, lora_alpha=2 * r)
    assert names(evidence) == said


@pytest.mark.parametrize(
    "evidence",
    [
        replace(HEALTHY, rows=rows(r=16, half=0.15)),
        replace(HEALTHY, rows=rows(r=2, half=0.4), validated=OVERFIT),  # more would learn more by heart
        replace(HEALTHY, rows=rows(r=2, half=0.4), validated=[(0, 4.41), (60, 4.40)]),  # has learned nothing yet
        Evidence(rows=rows(r=2, half=0.4, step=2), config=HEALTHY.config),
        replace(HEALTHY, rows=rows(r=1, half=None, needed=1)),
        replace(HEALTHY, rows=[]),
    ],
)
def test_a_rank_that_suffices_is_not_raised(evidence):
    assert "rank saturated" not in names(evidence)


def test_a_rank_of_which_little_is_used_is_too_large():
    ample = with_lora(replace(HEALTHY, rows=rows(r=64, needed=11, half=0.01)), r=64, lora_alpha=128)
    advice = the("rank unused", ample)
    assert advice.override == "lora.r=16 lora.lora_alpha=32"
    assert "11 of 64" in advice.sentence
    own_alpha = with_lora(ample, lora_alpha=16)  # of the user's own experiment file, say
    assert the("rank unused", own_alpha).override == "lora.r=16 lora.lora_alpha=4"
    own = with_lora(ample, alpha_pattern={"q_proj": 64})
    assert the("rank unused", own).override == "lora.r=16 lora.lora_alpha=32 '+lora.alpha_pattern={q_proj:16}'"
    assert the("rank unused", with_lora(ample, alpha_pattern={"(q|k)_proj": 64})).override is None
    rslora = with_lora(ample, use_rslora=True)
    assert the("rank unused", rslora).override == "lora.r=16 lora.lora_alpha=64"
    old = LoraConfig(r=64, lora_alpha=128, use_rslora=True).scaling()
    assert LoraConfig(r=16, lora_alpha=64, use_rslora=True).scaling() == old


@pytest.mark.parametrize(
    "layers",
    [
        rows(r=64, needed=33),
        rows(r=64, needed=8)[:5] + rows(r=64, needed=50)[5:],  # most of the layers need it
        rows(r=16, needed=1)[:6] + rows(r=32, needed=1)[6:],  # somebody has thought about it
        rows(r=16, needed=0),
    ],
)
def test_a_rank_that_is_needed_is_not_lowered(layers):
    assert "rank unused" not in names(with_lora(replace(HEALTHY, rows=layers), r=layers[0].r))


def test_nothing_is_said_of_the_rank_of_what_has_learned_nothing():
    layers = rows(r=64, needed=7, half=0.01)
    ample = with_lora(replace(HEALTHY, rows=layers), r=64)
    assert names(ample) == ["rank unused"]
    assert names(replace(ample, validated=[(0, 4.41), (60, 4.40)])) == ["learning rate too low"]
    underway = [(0, 4.41), (30, 2.73), (60, 2.53)]
    assert names(replace(ample, validated=underway)) == []
    few = Evidence(validated=[(0, 4.4), (2, 4.0)], rows=rows(r=64, needed=7, step=2), config=ample.config)
    assert names(few) == []


def test_one_layer_that_is_short_is_no_reason_to_lower_the_others():
    head = replace(rows(r=64)[0], layer="lm_head", lesser_half=0.3, rank_95=60)
    layers = [*rows(r=64, needed=7, half=0.01, blocks=20), head]
    assert names(with_lora(replace(HEALTHY, rows=layers), r=64, lora_alpha=128)) == ["rank saturated"]


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
