"""Which jobs share a base: told from real configurations, and always the whole sweep, each job once."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_lightning.sweeps.packed.grouping import divided, group, shared, told
from lora_lightning.sweeps.packed.packable import PackableJob, base_config, why_alone, why_base_alone
from lora_lightning.sweeps.runs import Job


@cache
def composed(*overrides: str):
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        cfg = compose("train", overrides=["experiment=smoke", "paths.output_dir=out", *overrides])
    return OmegaConf.to_container(cfg, resolve=True)


def job(number: int, *overrides: str, devices: int = 1, base=None) -> PackableJob:
    return PackableJob(Job(number, overrides, Path(f"/sweep/{number}"), devices), composed(*overrides), base)


def numbers(groups):
    return [[one.number for one in group.jobs] for group in groups]


@pytest.mark.parametrize(
    "own",
    [
        "lora.r=4",
        "lora.lora_alpha=64",
        "lora.use_rslora=true",
        "lora.lora_dropout=0.3",
        "lora=conservative",
        "lora.init_lora_weights=gaussian",
        "+lora.rank_pattern.q_proj=2",
        "seed=5",
        "learning_rate=1e-4",
        "optimizer=sgd",
        "optimizer.weight_decay=0.1",
        "scheduler=constant",
        "trainer.max_steps=7",
        "trainer.gradient_clip_val=0.1",
        "trainer.accumulate_grad_batches=4",
        "trainer.val_check_interval=3",
        "callbacks=minimal",
        "callbacks.lora.on_nonfinite=skip",
        "+callbacks.early={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val_loss}",
        "logger=tensorboard",
        "data.seed=3",
        "data.rows=64",
        "data.val_rows=8",
        "trainer.precision=32",
        "task.max_new_tokens=3",
    ],
)
def test_what_is_the_jobs_own_may_differ(own):
    groups = group([job(0), job(1, own)])
    assert numbers(groups) == [[0, 1]]
    assert groups[0].alone is None


@pytest.mark.parametrize(
    ("alone", "because"),
    [
        (["lora.use_dora=true"], "use_dora"),
        (["lora=dora"], "use_dora"),
        (["lora.init_lora_weights=pissa_niter_4"], "changes its base"),
        (["lora=eva"], "looks at data"),
        (["lora=mica"], "trains A alone"),
        (["+lora.alora_invocation_tokens=[1,2]"], "alora_invocation_tokens"),
        (["optimizer=lora_fa"], "optimizer=lora_fa"),
        (["lora.modules_to_save=[lm_head]"], "trains lm_head in full"),
        (["lora.bias=lora_only"], "biases of the base"),
        (["lora.task_type=SEQ_CLS"], "a head in full"),
        (["lora.target_modules=[q_proj,embed_tokens]"], "embed_tokens, an embedding or the head"),
        (["lora.target_modules=[lm_head]"], "lm_head"),
        (["experiment=bbc_topics"], "classifier's head"),
        (["task._target_=mine.Task"], "mine.Task"),
        (["data.packing=true"], "several examples into a row"),
        (["model.compile=true"], "model.compile"),
        (["model.gradient_checkpointing=true"], "gradient_checkpointing"),
        (["callbacks.lora.base_adapter=old"], "base_adapter"),
        (["callbacks.lora=null"], "without a LoraCallback"),
        (["+callbacks.again=${callbacks.lora}"], "2 LoraCallbacks"),
        (["+callbacks.find={_target_:lightning.pytorch.callbacks.BatchSizeFinder}"], "BatchSizeFinder"),
        (["trainer=ddp"], "DDPStrategy"),
        (["trainer.precision=16-mixed"], "16-mixed is none of 32-true"),
        (["trainer.profiler=simple"], "profiler"),
        (["trainer.max_time=00:01:00:00"], "max_time"),
        (["trainer._target_=mine.Trainer"], "mine.Trainer"),
    ],
)
def test_what_reaches_into_forward_or_base_goes_alone(alone, because):
    groups = group([job(0), job(1, *alone), job(2)])
    assert numbers(groups) == [[0, 2], [1]]
    assert because in groups[1].alone


def test_what_a_regular_expression_means_is_left_to_the_model():
    assert why_alone(job(0, "lora.target_modules='.*'", "lora.exclude_modules='.*(embed_tokens|lm_head)'")) is None


def test_several_devices_go_alone_and_every_reason_is_told():
    groups = group([job(0), job(1), job(2, "model.compile=true", "lora.use_dora=true", devices=2)])
    assert numbers(groups) == [[0, 1], [2]]
    for words in ("2 devices", "use_dora", "model.compile"):
        assert words in groups[1].alone


def test_a_base_that_draws_or_is_quantised_goes_alone():
    gpt2 = {"attn_pdrop": 0.1, "resid_pdrop": 0.0, "summary_first_dropout": 0.1, "use_cache": True}
    assert why_alone(job(0, base=gpt2)) == "its base has a dropout of its own (attn_pdrop 0.1)"
    assert list(why_base_alone({"quantization_config": {"bits": 4}})) == ["its base is quantised"]
    assert "router" in next(why_base_alone({"text_config": {"output_router_logits": True}}))
    assert not list(why_base_alone({"attention_dropout": 0.0, "classifier_dropout": 0.1, "hidden_dropout": None}))


def test_config_of_a_base_is_read_where_it_lies(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"resid_pdrop": 0.1}))
    assert base_config({"name": str(tmp_path)}) == {"resid_pdrop": 0.1}
    assert base_config({"name": "demo:tiny-llama", "revision": None}) is None
    assert base_config({"name": "nobody/has-this", "revision": None}) is None


def test_one_that_differs_is_told_by_how():
    groups = group([job(0), job(1), job(2), job(3, "data.batch_size=4")])
    assert numbers(groups) == [[0, 1, 2], [3]]
    assert told(groups) == [
        "Jobs 0–2 are trained together on one base.",
        "Job 3 goes alone: its data.batch_size is 4, the others' 8.",
    ]


def test_two_groups_are_told_apart():
    groups = group([job(n, f"data.batch_size={rows}") for n, rows in enumerate((8, 4, 8, 4))])
    assert numbers(groups) == [[0, 2], [1, 3]]
    assert told(groups)[1] == "Jobs 1, 3 are trained together on one base (data.batch_size=4)."


def test_no_two_alike():
    groups = group([job(0), job(1, "trainer.precision=64-true")])
    assert [each.alone for each in groups] == [
        "its trainer.precision is 32-true, job 1's 64-true",
        "its trainer.precision is 64-true, job 0's 32-true",
    ]
    assert group([job(0)])[0].alone == "there is no other job to train it with"


def test_jobs_for_one_reason_are_told_in_one_line():
    lines = told(group([job(n, "lora.use_dora=true") for n in range(3)]))
    assert lines == ["Jobs 0–2 go alone, each: lora.use_dora: lengths of weights are not low-rank."]


def test_groups_are_divided_over_devices():
    jobs = [job(n) for n in range(8)]
    assert numbers(group(jobs, devices=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert numbers(group(jobs, devices=3)) == [[0, 1], [2, 3, 4], [5, 6, 7]]
    # two groups already occupy two devices
    both = [job(n, f"data.batch_size={4 if n % 2 else 8}") for n in range(8)]
    assert numbers(group(both, devices=2)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    apart = group(jobs[:2], devices=4)
    assert numbers(apart) == [[0], [1]]
    assert {each.alone for each in apart} == {"it has a device to itself"}


@given(st.integers(1, 40), st.integers(0, 50))
def test_parts_are_whole_and_even(count, parts):
    jobs = [object()] * count
    made = divided(jobs, parts)
    assert sum(map(len, made)) == count
    assert len(made) == max(1, min(parts, count))
    assert max(map(len, made)) - min(map(len, made)) <= 1


KINDS = ((), ("lora.r=4",), ("data.batch_size=4",), ("lora.use_dora=true",), ("data.batch_size=4", "seed=1"))


@settings(deadline=None)  # settings are composed once a kind
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12), st.integers(1, 4))
def test_every_job_is_in_one_group_of_its_like(kinds, devices):
    jobs = [job(number, *kind) for number, kind in enumerate(kinds)]
    groups = group(jobs, devices=devices)
    assert sorted(one.number for each in groups for one in each.jobs) == list(range(len(jobs)))
    for each in groups:
        assert (each.alone is None) == (len(each.jobs) > 1)
        assert all(shared(one) == shared(each.jobs[0]) for one in each.jobs)
        if len(each.jobs) > 1:
            assert not any(why_alone(one) for one in each.jobs)
    assert numbers(groups) == sorted(numbers(groups))
    assert numbers(group(jobs[::-1], devices=devices)) == numbers(groups)  # their order does not matter
    mentioned = " ".join(told(groups))
    assert mentioned.count("together") + mentioned.count("alone") >= 1


def test_grouping_is_light():
    code = (
        "import sys; import lora_lightning.sweeps.packed.grouping; "
        "print([m for m in ('torch', 'lightning', 'hydra', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
