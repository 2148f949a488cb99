"""Runs as they leave their curves and layers, for the rules of advice."""

import math
from dataclasses import replace

from lora_lightning.reports.advice import Evidence, judge
from lora_lightning.reports.insight import InsightRow

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
