"""The rules on the rank speak on a case made for them, and are silent on one that only looks like it."""

import shlex
from dataclasses import replace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lora_lightning import LoraConfig, inject_lora
from lora_lightning.adapters.spectrum import spectrum_of
from lora_lightning.reports.advice import Evidence
from lora_lightning.reports.insight.measure import names_below, watched_layers
from lora_lightning.reports.insight.places import places_of
from tests.reports.advice.cases import HEALTHY, OVERFIT, names, of_kind, rows, the, with_lora


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
